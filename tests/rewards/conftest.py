import pytest
from reward_inputs import save_clip


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory):
    """The folder of a tiny CLIP model with random weights, its tokenizer and its image processor."""
    return save_clip(tmp_path_factory.mktemp("clip"))
