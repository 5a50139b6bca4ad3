"""What keeps the code readable, as tests: who imports whom, and what a script or a family's stranger must not know."""

import ast
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from script_runs import ROOT


SCRIPTS = ["train_pso_online.py", "train_pso_lora_sdxl.py"]
CORE = ["schedules", "mdp", "losses", "keyed_rng"]

# Each part of pso_utils, and the parts that it may import beside itself.
MAY_IMPORT = {"errors": [], "sources": ["errors"]}
MAY_IMPORT |= {module: ["errors", *CORE] for module in CORE}
MAY_IMPORT["rewards"] = ["errors", "sources"]
MAY_IMPORT["families"] = ["errors", "sources", *CORE]
MAY_IMPORT["data"] = [*MAY_IMPORT["families"], "families", "rewards"]
MAY_IMPORT["run"] = [*MAY_IMPORT["data"], "data"]
MAY_IMPORT["evaluate"] = [*MAY_IMPORT["run"], "run"]
MAY_IMPORT["convert"] = MAY_IMPORT["evaluate"]


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def test_imports_go_one_way():
    for path in (ROOT / "pso_utils").rglob("*.py"):
        part = path.relative_to(ROOT / "pso_utils").parts[0].removesuffix(".py")
        ours = {module.split(".")[1] for module in imports(path) if module.startswith("pso_utils.")}
        assert part == "__init__" or ours <= {part, *MAY_IMPORT[part]}, path
        assert not any(
            module.split(".")[0] in ("demo", "tests", "train_pso_online", "train_pso_lora_sdxl")
            for module in imports(path)
        ), path


def test_only_families_know_what_differs_between_them():
    files = [path for path in (ROOT / "pso_utils").rglob("*.py") if path.parent.name != "families"]
    for path in [*files, *(ROOT / script for script in SCRIPTS)]:
        text = path.read_text().replace("distilled_unet", "")  # the flag's name
        found = re.findall(r"pooled|time_ids|\bunets?\b", text, flags=re.IGNORECASE)
        assert not found, f"{path}: {found}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_run_is_longer_than_a_screen(script):
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.FunctionDef) and node.name != "run":
            assert node.end_lineno - node.lineno < 60, node.name


def test_setup_names_every_package_that_is_imported():
    """As a requirement, an extra's, or part of one that is named beside its import."""
    distributions = {"PIL": "pillow"}
    optional = {"bitsandbytes", "wandb"}  # of flags that say so
    standard = {"__future__", *__import__("sys").stdlib_module_names}
    packages = set()
    for path in [*(ROOT / "pso_utils").rglob("*.py"), *(ROOT / script for script in SCRIPTS)]:
        packages |= {module.split(".")[0] for module in imports(path)}
    needed = {distributions.get(name, name) for name in packages - standard - optional - {"pso_utils"}}
    required = {requirement.name.lower().replace("-", "_") for requirement in requirements()}
    assert needed <= required, f"setup.py does not name {sorted(needed - required)}"


def requirements() -> list[Requirement]:
    (setup,) = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.keyword)
                and node.arg == "install_requires"]  # fmt: skip
    return [Requirement(text) for text in ast.literal_eval(setup.value)]


def test_no_fsspec_that_runs_code_of_a_data_set_is_let_in():
    """2025.3.0 and 2026.4.0 do, in a reference file system."""
    (fsspec,) = [requirement.specifier for requirement in requirements() if requirement.name == "fsspec"]
    assert not any(version in fsspec for version in ("2025.3.0", "2026.4.0")) and "2026.9.0" in fsspec


def test_whatever_is_caught_has_its_reason_beside_it():
    found = []
    for path in [*(ROOT / "pso_utils").rglob("*.py"), *(ROOT / script for script in SCRIPTS)]:
        lines = path.read_text().splitlines()
        found += [line for line in lines if re.match(r"\s*except( (Base)?Exception\b.*)?:", line)]
    assert found and all(re.search(r":  # \w", line) for line in found), found
