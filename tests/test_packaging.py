"""What is shipped: the wheel's modules and data, its versions, and what an import loads."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import faithmap

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "bench" / "faithmap"
ROOMS = ("explainers", "metrics", "datasets")
MEGABYTE = 1_000_000

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="compares the wheel with a checkout, and there is none"
)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel of this checkout, built without a network and without touching the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    # python -P keeps the checkout off sys.path, where a folder `build/` would shadow the tool.
    command = [
        sys.executable,
        "-P",
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(ROOT),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        yield archive


def checkout_files(suffix: str) -> set[str]:
    """Files of the checkout by the name that they have in the wheel."""
    files = [(file, CORE) for file in CORE.rglob(f"*{suffix}")]
    files += [(file, ROOT) for room in ROOMS for file in (ROOT / room).rglob(f"*{suffix}")]
    return {
        f"faithmap/{file.relative_to(base).as_posix()}"
        for file, base in files
        if file.is_file() and "__pycache__" not in file.parts
    }


def run_python(code: str, *flags: str) -> str:
    """Run code in a fresh interpreter, in the checkout, and return what it prints."""
    result = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


class TestWheel:
    def test_it_holds_every_module_and_no_other(self, wheel: zipfile.ZipFile) -> None:
        shipped = {name for name in wheel.namelist() if name.endswith(".py")}
        assert shipped == checkout_files(".py")

    def test_it_holds_every_data_file(self, wheel: zipfile.ZipFile) -> None:
        """Hatchling silently leaves out what .gitignore matches."""
        shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
        data = {name for name in checkout_files("") if not name.endswith(".py")}
        assert {name for name in shipped if not name.endswith(".py")} == data

    @pytest.mark.parametrize(
        "pattern",
        [
            "faithmap/py.typed",
            "faithmap/presets/quickstart.toml",
            "faithmap/published/mapping.csv",
            "faithmap/published/sources.csv",
            "faithmap/published/*-20??.csv",
            "faithmap/zoo/*.json",
            "faithmap/zoo/*.safetensors",
        ],
    )
    def test_it_holds_what_a_run_needs(self, wheel: zipfile.ZipFile, pattern: str) -> None:
        assert any(Path(name).match(pattern) for name in wheel.namelist()), f"no {pattern} in the wheel"

    def test_every_card_has_its_weights(self, wheel: zipfile.ZipFile) -> None:
        zoo = [Path(name) for name in wheel.namelist() if Path(name).parent == Path("faithmap/zoo")]
        cards = {file.stem for file in zoo if file.suffix == ".json"}
        assert cards == {file.stem for file in zoo if file.suffix == ".safetensors"}

    def test_nothing_else_is_installed(self, wheel: zipfile.ZipFile) -> None:
        tops = {name.split("/")[0] for name in wheel.namelist()}
        assert tops == {"faithmap", f"faithmap-{faithmap.__version__}.dist-info"}
        assert not [
            name for name in wheel.namelist() if name.startswith(("faithmap/tests", "faithmap/results"))
        ]

    def test_it_is_small(self, wheel: zipfile.ZipFile) -> None:
        assert wheel.filename is not None
        assert Path(wheel.filename).stat().st_size < 20 * MEGABYTE

    def test_it_carries_the_licence_and_the_command(self, wheel: zipfile.ZipFile) -> None:
        info = f"faithmap-{faithmap.__version__}.dist-info"
        assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()
        assert "faithmap = faithmap.cli:app_main" in wheel.read(f"{info}/entry_points.txt").decode()

    def test_no_licence_spreads_to_it(self, wheel: zipfile.ZipFile) -> None:
        """Nothing under the GPL among what is installed unasked."""
        metadata = wheel.read(f"faithmap-{faithmap.__version__}.dist-info/METADATA").decode()
        required = [
            line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line
        ]
        assert required
        assert not [
            line for line in required if any(name in line for name in ("quantus", "zennit", "datasets"))
        ]


class TestLayout:
    @pytest.mark.parametrize("room", ROOMS)
    def test_rooms_are_no_packages(self, room: str) -> None:
        """With an __init__.py, `datasets/` would shadow the library of that name."""
        assert (ROOT / room).is_dir()
        assert not list((ROOT / room).rglob("__init__.py"))

    def test_tests_are_no_package(self) -> None:
        assert not list((ROOT / "tests").rglob("__init__.py"))
        assert not (ROOT / "conftest.py").exists()

    def test_no_module_bears_a_public_name(self) -> None:
        """A submodule `explain.py`, once imported, would take the place of `faithmap.explain`."""
        modules = {file.stem for file in CORE.glob("*.py")} | {
            file.name for file in CORE.iterdir() if file.is_dir()
        }
        assert not modules & set(faithmap.__all__)

    def test_only_one_module_imports_hugging_faces_datasets(self) -> None:
        importers = {
            file.name
            for file in CORE.rglob("*.py")
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
            if name.split(".")[0] == "datasets"
        }
        assert importers <= {"hub.py"}

    def test_the_core_imports_no_plugin(self) -> None:
        prefixes = tuple(f"faithmap.{room}" for room in ROOMS)
        for file in CORE.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    assert not (node.module or "").startswith(prefixes), file
                elif isinstance(node, ast.Import):
                    assert not [alias for alias in node.names if alias.name.startswith(prefixes)], file


class TestVersion:
    def test_it_is_the_same_everywhere(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert project["version"] == faithmap.__version__
        assert importlib.metadata.version("faithmap") == faithmap.__version__
        citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
        assert f"version: {faithmap.__version__}" in citation
        assert f"## [{faithmap.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

    def test_constraints_name_no_build_and_no_place(self) -> None:
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        pins = [line for line in lines if line and not line.startswith("#")]
        assert not [line for line in pins if line.count("==") != 1 or any(sign in line for sign in "+/@ ")]
        names = [line.split("==")[0] for line in pins]
        assert len(names) == len(set(names))

    def test_everything_asked_for_is_pinned(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        asked = [
            *project["dependencies"],
            *(line for extra in project["optional-dependencies"].values() for line in extra),
        ]
        pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
        assert not [line for line in asked if f"\n{line.split('>=')[0]}==" not in pinned]


HEAVY = "{'torch', 'torchvision', 'timm', 'captum', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules)"


class TestImport:
    def test_the_package_is_light(self) -> None:
        assert run_python(f"import sys, faithmap; print({HEAVY} or 'none')") == "none"

    def test_help_loads_no_torch(self) -> None:
        code = (
            "import sys\nsys.argv = ['faithmap', '--help']\n"
            "from faithmap.cli import app_main\n"
            "try:\n    app_main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
            "print('torch' in sys.modules)"
        )
        printed = run_python(code)
        assert printed.splitlines()[-1] == "False"
        assert "leaderboard" in printed

    def test_public_names_resolve(self) -> None:
        for name in faithmap.__all__:
            assert getattr(faithmap, name) is not None
        assert set(faithmap.__all__) <= set(dir(faithmap))

    def test_an_unknown_name_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'leader'"):
            faithmap.leader  # noqa: B018

    def test_hugging_faces_datasets_is_not_shadowed(self) -> None:
        """In the checkout, with the checkout on sys.path as `python -m` and notebooks put it."""
        if not installed("datasets"):
            pytest.skip("needs the extra `huggingface`")
        assert run_python("import faithmap, datasets; print(hasattr(datasets, 'load_dataset'))") == "True"


def installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class TestTorchvision:
    """The shim lets everything that needs torchvision be imported, in whatever order."""

    @pytest.mark.parametrize("first", [pytest.param("timm", marks=pytest.mark.long), "pytorch_grad_cam"])
    def test_the_stack_imports(self, first: str) -> None:
        code = (
            f"import faithmap\nimport {first}\nimport torchvision, timm, pytorch_grad_cam\n"
            "from torchvision.transforms import v2\n"
            "from faithmap import _torchvision\nprint(_torchvision.state())"
        )
        printed = run_python(code)
        assert printed.startswith("torchvision ")
        assert "native operators" in printed or "schemas only" in printed

    def test_looking_for_torchvision_loads_nothing(self) -> None:
        code = (
            "import sys, importlib.util, faithmap\n"
            "assert importlib.util.find_spec('torchvision') is not None\nprint('torch' in sys.modules)"
        )
        assert run_python(code) == "False"

    def test_the_finder_and_its_loader_step_aside(self) -> None:
        code = (
            "import sys, faithmap, torchvision\n"
            "from faithmap._torchvision import _Finder, _Mending, install\n"
            "install()\n"
            "print(any(isinstance(finder, _Finder) for finder in sys.meta_path),"
            " isinstance(torchvision.__spec__.loader, _Mending))"
        )
        assert run_python(code) == "False False"

    def test_a_torchvision_that_is_there_is_left_alone(self) -> None:
        code = (
            "import sys, types\nsys.modules['torchvision'] = fake = types.ModuleType('torchvision')\n"
            "fake.__version__ = '9.9'\nimport faithmap\n"
            "from faithmap import _torchvision\nprint('torch' in sys.modules, _torchvision.state())"
        )
        assert run_python(code) == "False torchvision 9.9, imported before faithmap, left as it was"
