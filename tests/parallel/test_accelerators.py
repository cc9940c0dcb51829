"""Optional packages are told apart by what is in them, without importing them."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.accelerators import Accelerator, ApexTrap, check_apex, find_accelerators, markdown

REPOSITORY = Path(__file__).resolve().parents[2]


def package(folder: Path, *modules: str) -> None:
    """Files for `modules`; importing any of them ends the process with code 9."""
    for module in modules:
        path = folder / Path(*module.split("."))
        path.mkdir(parents=True, exist_ok=True)
        (path / "__init__.py").write_text("import os\nos._exit(9)\n")


def python(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(REPOSITORY)])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=30,
    )


SHOW = """
from parallel.accelerators import check_apex, find_accelerators
for a in find_accelerators():
    print(a.name, a.found, a.problem)
check_apex()
"""


def test_every_package_says_what_it_does_and_how_to_get_it() -> None:
    accelerators = find_accelerators()
    names = [a.name for a in accelerators]
    assert names == ["apex", "transformer_engine", "flash_attn", "triton", "deepspeed"]
    for accelerator in accelerators:
        assert accelerator.used_for or accelerator.not_used_for
        assert accelerator.how_to_get
        assert accelerator.describe().startswith(accelerator.name)


def test_the_page_is_that_of_the_code() -> None:
    """Else: python -m parallel.accelerators > docs/accelerators.md. What it names is there."""
    for name in re.findall(r"`(?:pytest -m gpu )?((?:tests|parallel)/\S+?\.py)`", markdown()):
        assert (REPOSITORY / name).is_file(), name
    assert (REPOSITORY / "docs" / "accelerators.md").read_text() == markdown()


def test_what_is_missing_says_what_it_would_do() -> None:
    lines = {a.name: a.describe() for a in map(missing, find_accelerators())}
    assert lines["apex"].startswith("apex: not here; would do AdamW")
    assert "NVIDIA/apex" in lines["apex"]
    assert lines["flash_attn"].startswith("flash_attn: not here; not used: attention is torch's")


def test_what_is_compiled_later_is_not_called_missing() -> None:
    lines = {}
    for accelerator in find_accelerators():
        here = replace(accelerator, found=True, version="1", compiled={"a": False, "b": True})
        lines[here.name] = here.describe()
    assert lines["deepspeed"].endswith("; compiled at the first start that uses them: a)")
    assert lines["apex"].endswith("; without its compiled a)")


def missing(accelerator: Accelerator) -> Accelerator:
    return replace(accelerator, found=False, version=None, compiled={}, problem=None)


def test_the_unrelated_apex_is_a_trap(tmp_path: Path) -> None:
    package(tmp_path, "apex", "apex.lib")
    result = python(tmp_path, SHOW)
    assert result.returncode == 1, result.stderr
    assert f"apex False the package `apex` at {tmp_path / 'apex'} is not NVIDIA's" in result.stdout
    assert "ApexTrap" in result.stderr
    assert "fix: pip uninstall apex" in result.stderr


def test_the_trap_is_raised_in_this_process_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_apex()  # nothing here to complain about
    package(tmp_path, "apex")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ApexTrap, match="pip uninstall apex"):
        check_apex()


def test_the_real_apex_is_found_without_importing_it(tmp_path: Path) -> None:
    package(tmp_path, "apex", "apex.optimizers", "amp_C")
    code = SHOW + "print(find_accelerators()[0].describe())"
    result = python(tmp_path, code)
    assert result.returncode == 0, result.stderr
    assert "apex True None" in result.stdout
    line = result.stdout.splitlines()[-1]
    assert line.startswith("apex: version unknown (does AdamW")
    assert line.endswith("; without its compiled fused_weight_gradient_mlp_cuda)")
    package(tmp_path, "fused_weight_gradient_mlp_cuda")
    assert "without" not in python(tmp_path, code).stdout.splitlines()[-1]


def test_operations_of_deepspeed_are_read_from_what_it_wrote_down(tmp_path: Path) -> None:
    package(tmp_path, "deepspeed", "deepspeed.runtime")
    code = "from parallel.accelerators import find_accelerators as f; print(f()[4].compiled)"
    assert python(tmp_path, code).stdout == "{'fused_adam': False, 'cpu_adam': False}\n"
    written = tmp_path / "deepspeed" / "git_version_info_installed.py"
    written.write_text("version='1'\ninstalled_ops={'cpu_adam': True, 'fused_adam': False}\n")
    assert python(tmp_path, code).stdout == "{'fused_adam': False, 'cpu_adam': True}\n"
    written.write_text("version='1'\n")
    assert python(tmp_path, code).stdout == "{'fused_adam': False, 'cpu_adam': False}\n"


def test_apex_without_its_cuda_extension_is_not_found(tmp_path: Path) -> None:
    package(tmp_path, "apex", "apex.optimizers")
    result = python(tmp_path, SHOW)
    assert result.returncode == 0, result.stderr
    assert "apex False amp_C missing from it: build it from" in result.stdout


def test_versions_come_from_the_metadata(tmp_path: Path) -> None:
    package(tmp_path, "flash_attn", "flash_attn.flash_attn_interface")
    info = tmp_path / "flash_attn-2.9.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash_attn\nVersion: 2.9.1\n")
    code = "from parallel.accelerators import find_accelerators as f; print(f()[2].describe())"
    result = python(tmp_path, code)
    assert result.stdout.startswith("flash_attn: 2.9.1 ("), result.stderr


def test_looking_imports_neither_torch_nor_megatron(tmp_path: Path) -> None:
    code = SHOW + "import sys; print(sorted({'torch', 'megatron', 'triton'} & set(sys.modules)))"
    result = python(tmp_path, code)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr
