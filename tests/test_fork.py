"""The README's "Take the algorithm alone": the files that it names are enough for the loop that it prints."""

import os
import re
import shutil
import subprocess
import sys

from script_runs import ROOT


def test_the_named_files_and_the_printed_loop_make_an_update(tiny_pipeline_dir, tmp_path):
    readme = (ROOT / "README.md").read_text()
    section = readme[readme.index("## Take the algorithm alone") :]
    loop = re.search(r"<!-- fork -->\n```python\n(.*?)```", section, re.DOTALL)[1]
    assert len(loop.splitlines()) <= 60

    package = tmp_path / "pso_utils"
    (package / "families").mkdir(parents=True)
    text = section[: section.index("<!-- fork -->")]
    names = [name for name in re.findall(r"(\w+\.py)", text) if name != "__init__.py"]
    members = re.search(r"families/\{([\w,]+)\}", text)[1].split(",")
    files = ["__init__.py", *names, *(f"families/{member}.py" for member in members)]
    for name in files:
        shutil.copy(ROOT / "pso_utils" / name, package / name)
    loop = loop.replace('"demo/emoji-turbo"', repr(tiny_pipeline_dir))
    (tmp_path / "loop.py").write_text(
        loop + "assert all((p != 0).any() for p in optimizer.param_groups[0]['params'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "loop.py"], cwd=tmp_path, env=environment, check=True, timeout=300)
    assert (tmp_path / "outputs" / "fork" / "pytorch_lora_weights.safetensors").is_file()
    loaded = subprocess.run(
        [sys.executable, "-c", "import pso_utils; print(pso_utils.__file__)"], cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(tmp_path) in loaded.stdout  # the copy, not the installed package
