"""The code that nvcc generates: no register spills, tensor-core instructions, a short build. Needs no GPU."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import product
from pathlib import Path

import pytest

from megatron_lightseq.kernels.cuda import HEAD_DIMS
from tests.cuda.emulator import CSRC
from tests.cuda.overlap import overlapped_exponentials
from tests.cuda.roles import roles

ARCHITECTURES = ("80", "90a")
LATER = "120"
"""A GPU without native code in the default build: its driver compiles the PTX of 80."""
SOURCES = tuple(path.name for path in sorted((CSRC / "cuda").glob("*.cu")))
HOPPER_FORWARD = ("forward_sm90_bf16.cu", "forward_sm90_fp16.cu", "forward_sm90_softcap.cu")
HOPPER_BACKWARD = ("backward_sm90.cu", "backward_sm90_softcap.cu")
HOPPER_SOURCES = (*HOPPER_FORWARD, *HOPPER_BACKWARD)
HOPPER_BACKWARD_HEAD_DIMS = (64, 80, 96, 128)
BUILD_CPU_SECONDS = 240
"""Two minutes on two cores, for everything that setup.py compiles."""
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_\w+'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    return next((str(path) for path in candidates if path.is_file()), shutil.which("nvcc"))


def find_disassemblers() -> list[str]:
    """Folders of cuobjdump and of nvdisasm, which it starts: from PyPI (pinned), else from CUDA; [] if missing."""
    folders = []
    for tool in ("cuobjdump", "nvdisasm"):
        beside = Path(find_nvcc() or "/nowhere").parent / tool
        found = from_package(tool) or (str(beside) if beside.is_file() else shutil.which(tool))
        if found is None:
            return []
        folders.append(str(Path(found).parent))
    return folders


def from_package(tool: str) -> str | None:
    """The program from the PyPI package nvidia-cuda-TOOL, if that is installed."""
    try:
        files = metadata.files(f"nvidia-cuda-{tool}") or []
    except metadata.PackageNotFoundError:
        return None
    return next((str(path.locate()) for path in files if path.name == tool), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """One source for one architecture."""

    object_file: str
    ptxas_report: str
    cpu_seconds: float


def compile_source(nvcc: str, source: str, architecture: str, folder: Path) -> Compiled:
    target = folder / f"{source}.{architecture}.o"
    virtual = "80" if architecture == LATER else architecture
    flags = ("-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC", "-Xptxas", "-v")
    code = f"-gencode=arch=compute_{virtual},code=sm_{architecture}"
    include = ("-I", str(CSRC), "-I", str(CSRC / "include"))
    report = target.with_suffix(".txt")
    with report.open("w") as output:
        process = subprocess.Popen(
            [nvcc, *flags, code, *include, "-c", str(CSRC / "cuda" / source), "-o", str(target)],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)  # of this process: others are compiling too
    process.returncode = os.waitstatus_to_exitcode(status)
    text = report.read_text()
    assert process.returncode == 0, text[-3000:]
    return Compiled(object_file=str(target), ptxas_report=text, cpu_seconds=usage.ru_utime + usage.ru_stime)


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], Compiled]:
    """Every source compiled for every architecture. Cached between runs while the sources do not change."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc here")
    digest = hashlib.sha256(subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout)
    for path in sorted([*(CSRC / "cuda").rglob("*"), *(CSRC / "include").glob("*.h")]):
        if path.suffix in (".h", ".cu"):
            digest.update(path.name.encode() + path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"mls_nvcc_{os.getuid()}" / digest.hexdigest()[:20]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def compile_once(wanted: tuple[str, str]) -> Compiled:
        record = folder / "{}.{}.json".format(*wanted)
        if not record.exists():
            record.write_text(json.dumps(asdict(compile_source(nvcc, *wanted, folder))))
        return Compiled(**json.loads(record.read_text()))

    wanted = [*product(SOURCES, ARCHITECTURES), ("forward_sm80_bf16.cu", LATER)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(wanted, pool.map(compile_once, wanted), strict=True))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("source", "architecture"), [*product(SOURCES, ARCHITECTURES), ("forward_sm80_bf16.cu", LATER)]
)
def test_kernels_stay_in_registers(
    compiled: dict[tuple[str, str], Compiled], source: str, architecture: str
) -> None:
    report = compiled[source, architecture].ptxas_report
    kernels = list(KERNEL.finditer(report))
    assert len(kernels) == report.count("Compiling entry function")
    assert bool(kernels) == (source != "run.cu")
    for kernel in kernels:
        assert (kernel["stack"], kernel["stores"], kernel["loads"]) == ("0", "0", "0"), kernel["name"]
        assert int(kernel["registers"]) <= 255
    assert "serialized" not in report  # in the warning of ptxas when it serialises asynchronous wgmma
    assert "setmaxnreg" not in report  # in the warning of ptxas when it ignores setmaxnreg


def test_build_is_short(compiled: dict[tuple[str, str], Compiled]) -> None:
    ours = [one for (_, architecture), one in compiled.items() if architecture != LATER]
    assert sum(one.cpu_seconds for one in ours) < BUILD_CPU_SECONDS


def sass(object_file: str) -> str:
    folders = find_disassemblers()
    if not folders:
        pytest.skip("no cuobjdump and nvdisasm here")
    path = os.pathsep.join([*folders, os.environ["PATH"]])
    result = subprocess.run(
        [f"{folders[0]}/cuobjdump", "-sass", object_file],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": path},
    )
    return result.stdout


def test_ampere_kernels_use_its_tensor_cores(compiled: dict[tuple[str, str], Compiled]) -> None:
    for source in ("forward_sm80_bf16.cu", "backward_sm80_bf16.cu", "forward_sm80_softcap.cu"):
        text = sass(compiled[source, "80"].object_file)
        for function in text.split("Function : ")[1:]:
            name = function.split()[0]
            for wanted in (
                "HMMA.16816.F32.BF16" if "BFloat16" in name else "HMMA.16816.F32",
                "LDSM.16.MT88.4",
                "LDGSTS",
            ):
                assert wanted in function, f"{name} has no {wanted}"
            for unwanted in ("STL", "LDL", "HGMMA"):
                assert unwanted not in function, f"{name} has {unwanted}"


@pytest.mark.parametrize("source", HOPPER_FORWARD)
def test_hopper_kernels_use_its_tensor_cores(compiled: dict[tuple[str, str], Compiled], source: str) -> None:
    text = sass(compiled[source, "90a"].object_file)
    functions = text.split("Function : ")[1:]
    assert len(functions) == len(HEAD_DIMS) * (2 if "softcap" in source else 1)
    for function in functions:
        name = function.split()[0]
        head_dim, value_dim, _, keys = map(int, re.findall(r"Li(\d+)E", name))
        # The scores of 16 columns of the head dim at a time, and the output of 16 keys at a time.
        products = Counter(re.findall(r"HGMMA\.(64x\d+x16)\.F32", function))
        wanted_products = Counter({f"64x{keys}x16": 2 * head_dim // 16})  # for the first tile, and the loop
        for columns in filter(None, (value_dim // 64 * 64, value_dim % 64)):  # whole panels, and the rest
            wanted_products[f"64x{columns}x16"] += 2 * keys // 16  # in the loop, and for the last tile
        assert products == wanted_products, name
        for wanted in ("UTMALDG.4D", "USETMAXREG", "SYNCS"):
            assert wanted in function, f"{name} has no {wanted}"
        for unwanted in ("STL", "LDL", " HMMA"):
            assert unwanted not in function, f"{name} has {unwanted}"


def gradient_products(head_dim: int, kernel: str) -> Counter[str]:
    """Number of wgmma instructions per tile, by shape. A tile is 64 queries by 128 keys; for dq alone, 128 by 128."""
    parts = [
        columns for columns in (head_dim // 64 * 64, head_dim % 64) if columns
    ]  # whole panels, and the rest
    products = Counter({"64x128x16" if kernel == "dq" else "64x64x16": 2 * head_dim // 16})  # S and dP
    for columns in parts:
        products[f"64x{columns}x16"] += 128 // 16 if kernel == "dq" else 2 * 64 // 16  # dQ, or dV and dK
    if kernel == "all":
        products[f"64x{-(-head_dim // 64) * 64 // 2}x16"] += 128 // 16  # half of dQ's panels
    return products


@pytest.mark.parametrize("source", HOPPER_BACKWARD)
def test_hopper_gradients_use_its_tensor_cores(
    compiled: dict[tuple[str, str], Compiled], source: str
) -> None:
    functions = sass(compiled[source, "90a"].object_file).split("Function : ")[1:]
    seen: Counter[tuple[int, str]] = Counter()
    for function in functions:
        name = function.split()[0]
        head_dim = int(re.findall(r"Li(\d+)E", name)[0])
        kernel = "dq" if "backward_dq" in name else "all" if "Lb1E" in name else "keys"
        seen[head_dim, kernel] += 1
        products = Counter(re.findall(r"HGMMA\.(64x\d+x16)\.F32", function))
        assert products == gradient_products(head_dim, kernel), name
        for wanted in ("UTMALDG.4D", "USETMAXREG", *(["UTMAREDG.4D.ADD", "STSM"] if kernel == "all" else [])):
            assert wanted in function, f"{name} has no {wanted}"
        for unwanted in ("STL", "LDL", " HMMA"):
            assert unwanted not in function, f"{name} has {unwanted}"
    # Each in two element types.
    assert seen == {
        (head_dim, kernel): 2 for head_dim in HOPPER_BACKWARD_HEAD_DIMS for kernel in ("all", "keys", "dq")
    }


def exponentials_of_a_tile(name: str) -> int:
    """Per thread of a consumer warpgroup, which has 64 rows: half of the other dimension of the tile."""
    if "forward" in name:
        return int(re.findall(r"Li(\d+)E", name)[-1]) // 2
    return 128 // 2 if "backward_dq" in name else 64 // 2


@pytest.mark.parametrize("source", HOPPER_SOURCES)
def test_softmax_overlaps_with_a_product(compiled: dict[tuple[str, str], Compiled], source: str) -> None:
    """The exponentials are between the wait for the scores and the wait for the concurrent product."""
    functions = sass(compiled[source, "90a"].object_file).split("Function : ")[1:]
    assert functions
    for function in functions:
        name = function.split()[0]
        assert overlapped_exponentials(function) >= exponentials_of_a_tile(name), name


def test_a_wait_before_the_exponentials_is_no_overlap() -> None:
    lines = [
        "WARPGROUP.DEPBAR.LE gsb0, 0x1",
        "MUFU.EX2 R1, R2",
        "MUFU.EX2 R3, R4",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    ]
    assert overlapped_exponentials(listing(lines)) == 2
    assert overlapped_exponentials(listing([lines[0], lines[3], *lines[1:3]])) == 0
    assert overlapped_exponentials(listing([lines[3], *lines[1:3], lines[3]])) == 0
    assert overlapped_exponentials(listing(lines[:3])) == 0


def listing(lines: list[str]) -> str:
    """Instructions as cuobjdump prints them."""
    return "".join(f"    /*{16 * number:04x}*/   {text} ;\n" for number, text in enumerate(lines))


@pytest.mark.parametrize("source", HOPPER_SOURCES)
def test_roles_keep_within_the_registers_they_ask_for(
    compiled: dict[tuple[str, str], Compiled], source: str
) -> None:
    functions = sass(compiled[source, "90a"].object_file).split("Function : ")[1:]
    assert functions
    for function in functions:
        found = roles(function)
        assert sorted(role.gives for role in found) == [False, True], function.split()[0]
        for role in found:
            assert 0 < role.used <= role.allowed, function.split()[0]


SNIPPET = """
    /*0000*/   @P0 BRA 0x50 ;
    /*0010*/   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8 ;
    /*0020*/   HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR8], R24 ;
    /*0030*/   @!P1 BRA 0x90 ;
    /*0040*/   EXIT ;
    /*0050*/   USETMAXREG.DEALLOC.CTAPOOL 0x28 ;
    /*0060*/   LDG.E.128 R8, desc[UR4][R30.64] ;
    /*0070*/   BRA P2, 0x60 ;
    /*0080*/   EXIT ;
    /*0090*/   IMAD.WIDE R200, R3, 0x4, R6 ;
    /*00a0*/   BRA 0x20 ;
"""


def test_registers_are_counted_by_what_a_role_can_reach() -> None:
    taking, giving = roles(SNIPPET)
    assert (taking.gives, taking.allowed, taking.used) == (False, 232, 202)  # including the jump target
    assert (giving.gives, giving.allowed, giving.used) == (True, 40, 32)
    longer = SNIPPET.replace("@!P1 BRA 0x90", "EXIT")
    assert roles(longer)[0].used == 156  # the four registers from R152 on
    assert roles(longer.replace("R8,", "R40,"))[1].used == 44
