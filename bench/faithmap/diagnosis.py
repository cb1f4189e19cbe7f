"""`faithmap doctor`: versions, devices, torchvision's state, plugins and caches."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from rich.console import Console

import faithmap
from faithmap import _torchvision, registry
from faithmap.fitting import home
from faithmap.provenance import checkout, git_state, library_versions


def report(console: Console) -> int:
    """Print the report; 1 where something needs mending."""
    faults: list[str] = []
    lines = [
        ("faithmap", f"{faithmap.__version__} in {Path(faithmap.__file__).parent}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
    ]
    state = git_state(checkout())
    if state["commit"]:
        lines.append(("commit", f"{state['commit'][:12]}{' with changes' if state['dirty'] else ''}"))
    lines += list(library_versions().items())
    lines += _devices()
    lines.append(("torchvision", _torchvision.state()))
    for kind in registry.KINDS:
        lines.append((f"{kind}s", str(len(registry.plugins(kind)))))
        faults += [
            f"{kind} '{name}' does not load: {reason}" for name, reason in registry.broken(kind).items()
        ]
    fits = home()
    lines.append(("fits", f"{fits}{'' if (fits / 'fitted').is_dir() else ' (none yet)'}"))
    lines += _caches()
    here = Path.cwd()
    other = (here / "bench" / "faithmap").is_dir() and checkout() != here.resolve()
    if other:
        used = Path(faithmap.__file__).parent
        faults.append(
            f"the working directory is a checkout of faithmap, but the package in use is {used}; changes "
            "here have no effect: pip install -c constraints.txt -e ."
        )
    for name, value in lines:
        console.print(f"{name:<14}{value}", markup=False, highlight=False, soft_wrap=True)
    for fault in faults:
        console.print(f"problem: {fault}", markup=False, highlight=False, soft_wrap=True)
    return 1 if faults else 0


def _devices() -> list[tuple[str, str]]:
    import torch

    lines = [("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        lines.append((f"cuda:{i}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.is_available():
        lines.append(("cuda", "not available"))
    if torch.backends.mps.is_available():
        lines.append(("mps", "available"))
    return lines


def _caches() -> list[tuple[str, str]]:
    hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    torch_home = Path(os.environ.get("TORCH_HOME", Path.home() / ".cache" / "torch"))
    return [
        ("hub cache", f"{hub}{'' if hub.is_dir() else ' (none yet)'}"),
        ("torch cache", f"{torch_home}{'' if torch_home.is_dir() else ' (none yet)'}"),
    ]
