from pathlib import Path

import pytest
import torch
from evaluation_runs import PROMPTS, TURBO

from pso_utils.evaluate import drawing
from pso_utils.families import find_family
from pso_utils.families.loading import ModelSource, load_pipeline


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder with prompts.txt and two random LoRAs, a and b."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    for name, seed in (("a", 1), ("b", 2)):
        pipeline = load_pipeline(ModelSource(TURBO))
        family = find_family(type(pipeline).__name__, TURBO)(pipeline)
        generator = torch.Generator().manual_seed(seed)
        for parameter in family.add_lora(rank=4, seed=0):
            with torch.no_grad():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        family.save_lora(folder / name)
    return folder


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """The number of images in each batch that is drawn."""
    calls, draw = [], drawing.draw

    def count(family, conditionings, seeds, **settings):
        calls.append(len(seeds))
        return draw(family, conditionings, seeds, **settings)

    monkeypatch.setattr(drawing, "draw", count)
    return calls
