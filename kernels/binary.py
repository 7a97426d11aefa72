"""What `dskd_fast.kernels.report` reads of a compiled kernel: registers, spills and instructions."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton


class Instruction(NamedTuple):
    """Mnemonic, e.g. "HMMA", with what follows it, e.g. ".16816.F32.BF16"; and the label that a branch goes to."""

    name: str
    suffix: str
    target: str | None


def read_cubin(cubin: bytes) -> tuple[dict[str, int], list[Instruction], dict[str, int]]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)

        def run(tool: str, option: str) -> str:
            command = [str(tools / tool), option, str(file)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", run("cuobjdump", "--dump-resource-usage")))
        text = run("nvdisasm", "-c")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_]*)(\S*)(.*)", line):
            target = re.search(r"\((\.L\w+)\)", found[3]) if found[1] == "BRA" else None
            instructions.append(Instruction(found[1], found[2], target and target[1]))
    spilled = int(usage["STACK"]) + int(usage["LOCAL"])
    return {"registers": int(usage["REG"]), "spilled": spilled}, instructions, labels


def read_amdgcn(text: str) -> tuple[dict[str, int], list[Instruction], dict[str, int]]:
    def usage(name: str) -> int:
        return int(re.search(rf"{name}:\s*(\d+)", text)[1])

    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+((?:s|v|ds|buffer|global|flat|scratch)_\w+)(.*)", line):
            target = re.search(r"(\.LBB\w+)", found[2]) if "branch" in found[1] else None
            name = "v_mfma" if found[1].startswith("v_mfma") else found[1].removesuffix("_e32").removesuffix("_e64")
            instructions.append(Instruction(name, found[1], target and target[1]))
    return {"registers": usage("TotalNumVgprs"), "spilled": usage("ScratchSize")}, instructions, labels
