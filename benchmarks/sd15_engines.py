"""What engines of Stable Diffusion 1.5 at full size cost to make, without a GPU: seconds, memory, bytes.

    python -m benchmarks.sd15_engines --record            512x512, all networks; an hour
    python -m benchmarks.sd15_engines --size 256 --networks unet,gradient --rows 16

Functions are those of dfkd/synthesis/functions.py on networks with random weights in float16 (benchmarks/sd15.py);
gradients hold the decoder, a ResNet-34 and its BatchNorm statistics. Each is traced, exported to ONNX, and compiled by
the backend tensorrt-rtx for TARGETS, ahead of time. Two processes a network, one up to the ONNX file and one from
there, so that each figure of memory is its own, and a failure is a row that says so. The result is written after every
stage.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.recording import RESULTS, finish, names_of, not_measured, table, taken_on
from dfkd.files import replace_text
from dfkd_engine.backends.packages import versions
from dfkd_engine.backends.tensorrt import TENSORRT_RTX
from dfkd_engine.devices import family
from dfkd_engine.errors import EngineError
from dfkd_engine.graph import Graph
from dfkd_engine.spec import EngineSpec

NAME = "sd15-engines"
NETWORKS = ("unet", "gradient", "decode", "decode_vjp")
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_120")
WORKSPACES = (4, 8, 12, 16, 24, 32, 48, 64)  # GiB; the last is what the backend allows by itself
MODEL, SPEC, PLAN = "model.onnx", "spec.json", "engine.plan"
Stage = Iterator[dict[str, Any]]


def export(network: str, size: int, folder: Path, thin: bool) -> Stage:
    """Yields what tracing and exporting cost; leaves MODEL in the folder."""
    from benchmarks import sd15
    from benchmarks.bench_engines import PLAIN, function_of
    from dfkd.compiled.engines import engine_spec
    from dfkd.config import GenerateConfig
    from dfkd.synthesis.pipeline import GuidedPipeline
    from dfkd_engine.export import to_onnx
    from dfkd_engine.graph import trace

    seconds, (prior, teacher) = timed(lambda: (sd15.make_prior(size, "fp16", thin), sd15.make_teacher(thin)))
    yield {"networks_seconds": seconds}
    # a group in several calls takes the split form, of which decode_vjp is a part
    batch = 1 if network == "decode_vjp" else 2
    config = GenerateConfig.of(dtype="fp16", device="cpu", group=2, batch=batch, **PLAIN)
    made = function_of(GuidedPipeline(prior, teacher, config), network)
    outputs = [output.name for output in made.outputs]
    seconds, graph = timed(lambda: trace(made.call, made.inputs, output_names=outputs))
    weights = sum(value.numel() * value.element_size() for value in graph.module.buffers())
    yield {"trace_seconds": seconds, "nodes": len(graph.module.graph.nodes), "weight_bytes": weights}
    yield {"backward_operations": backward_operations(graph)}
    seconds, _ = timed(lambda: to_onnx(graph, folder / MODEL))
    yield {"onnx_seconds": seconds, "onnx_bytes": sum(file.stat().st_size for file in folder.iterdir())}
    spec = engine_spec(made, TENSORRT_RTX.name, family(TARGETS))
    (folder / SPEC).write_text(json.dumps(spec.to_json()))


def build(rows: int, folder: Path) -> Stage:
    """Yields what MODEL's plan for calls of `rows` rows costs, parsing and compiling; leaves PLAN in the folder.

    With the first of WORKSPACES that is enough: a library that fuses a whole network needs room for all its tensors.
    """
    spec = replace(EngineSpec.from_json(json.loads((folder / SPEC).read_text())), rows=(1, rows, rows))
    for gib in WORKSPACES:
        os.environ["DFKD_TENSORRT_WORKSPACE_GIB"] = str(gib)
        try:
            seconds, plan = timed(lambda: TENSORRT_RTX.build(folder / MODEL, spec))
        except EngineError as error:
            if "OutOfMemory" not in str(error) or gib == WORKSPACES[-1]:
                raise
            yield {"too_small_workspace_gib": gib}
        else:
            (folder / PLAN).write_bytes(plan)
            yield {"build_seconds": seconds, "plan_bytes": plan.nbytes, "workspace_gib": gib}
            return


def backward_operations(graph: Graph) -> list[str]:
    """Backward operations of a graph, by name: `trace` takes apart all but those it allows."""
    calls = (str(node.target) for node in graph.module.graph.nodes if node.op == "call_function")
    return sorted({name for name in calls if "backward" in name})


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return round(time.perf_counter() - started, 2), result


def child(stage: Stage, memory: str) -> None:
    """Print a line of JSON for every part of a stage, with this process's peak of memory so far under `memory`."""
    try:
        for found in stage:
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(json.dumps(found | {memory: peak}), flush=True)
    except Exception as error:  # compilers raise what they like; the row says it
        lines = str(error).strip().splitlines() or ["no message"]
        print(json.dumps({"failure": f"{type(error).__name__}: {lines[0]}"[:600]}), flush=True)


def run_child(words: list[str], limit: float) -> Stage:
    """The lines of a child process as they come, and a failure where it is killed or takes longer than `limit` s."""
    command = ["timeout", "--kill-after=10", str(limit), sys.executable, "-m", "benchmarks.sd15_engines", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
    status = process.returncode  # 124 is timeout's own; 137 is SIGKILL
    if status:
        whys = {124: f"stopped after {limit:g} s", 137: "killed, as where memory runs out"}
        yield {"failure": whys.get(status, f"ended with status {status}")}


def measure(network: str, size: int, rows: list[int], thin: bool, limit: float) -> Stage:
    """A row for every number of rows, yielded again whenever a part of it is known."""
    with tempfile.TemporaryDirectory() as name:
        base: dict[str, Any] = {"network": network, "size": size, "rows": rows[0]}
        given = ["--size", str(size), "--networks", network, "--folder", name, *(["--thin"] if thin else [])]
        for found in run_child([*given, "--child", "export"], limit):
            base |= found
            yield base
        for count in rows if "failure" not in base else []:
            row = base | {"rows": count}
            for found in run_child([*given, "--child", "build", "--rows", str(count)], limit):
                row |= found
                yield row


def merged(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """`rows` with `row` in the place of an earlier one of its network, size and rows."""
    own = ("network", "size", "rows")
    return [old for old in rows if [old[k] for k in own] != [row[k] for k in own]] + [row]


def markdown(result: dict[str, Any]) -> str:
    """The table of a result, with what failed below it."""
    heads = ["network", "image", "rows", "trace s", "nodes", "backward ops", "ONNX s", "ONNX GB", "memory GB"]
    heads += ["plan s", "plan GB", "memory GB", "workspace GiB"]
    ordered = sorted(result["rows"], key=lambda row: (-row["size"], NETWORKS.index(row["network"]), row["rows"]))
    cells = [
        [
            r["network"], f"{r['size']}x{r['size']}", r["rows"], _number(r, "trace_seconds"), r.get("nodes"),
            len(r["backward_operations"]) if "backward_operations" in r else None, _number(r, "onnx_seconds"),
            _number(r, "onnx_bytes", 1e9, 2), _number(r, "export_memory_bytes", 1e9, 1), _number(r, "build_seconds"),
            _number(r, "plan_bytes", 1e9, 2), _number(r, "build_memory_bytes", 1e9, 1), workspace(r),
        ]
        for r in ordered
    ]  # fmt: skip
    failed = [(f"{r['network']}, {r['rows']} rows", r["failure"]) for r in ordered if "failure" in r]
    under = (
        f"Random weights in float16 (the teacher's in float32), plans for {', '.join(TARGETS)}. Memory: peak of the "
        "process, first of tracing and exporting, last of building. Workspace: a limit that is enough, and the largest "
        f"tried that is not. TensorRT-RTX {result['versions'].get('tensorrt-rtx', 'absent')}, "
    )
    last = under + taken_on(result["machine"], "python -m benchmarks.sd15_engines --record")
    return "\n".join([*table(heads, cells), "", last, *not_measured(failed)])


def workspace(row: dict[str, Any]) -> str | None:
    enough, too_small = row.get("workspace_gib"), row.get("too_small_workspace_gib")
    return None if enough is None else f"{enough}" if too_small is None else f"{enough} (not {too_small})"


def _number(row: dict[str, Any], name: str, unit: float = 1.0, digits: int = 0) -> str | None:
    return f"{row[name] / unit:.{digits}f}" if name in row else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=names_of(NETWORKS), default=list(NETWORKS), help="default all")
    parser.add_argument("--size", type=int, default=512, help="of images (default 512)")
    parser.add_argument("--rows", default="2", help="of a call, comma-separated, a plan each (default 2)")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for a process (default 3600)")
    parser.add_argument("--thin", action="store_true", help="few channels: a rehearsal in seconds, never recorded")
    parser.add_argument("--record", action="store_true", help=f"write benchmarks/results/{NAME}-cpu.json")
    parser.add_argument("--child", choices=("export", "build"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args()
    rows = [int(word) for word in a.rows.split(",")]
    if a.child:
        if (score := Path("/proc/self/oom_score_adj")).exists():  # where memory runs out, this is the process to end
            score.write_text("1000")
        stage = export(a.networks[0], a.size, a.folder, a.thin) if a.child == "export" else build(rows[0], a.folder)
        child(stage, f"{a.child}_memory_bytes")
        return
    if a.thin and a.record:
        sys.exit("error: a rehearsal is not recorded: leave out --thin or --record")
    machine, path = describe(torch.device("cpu")), RESULTS / f"{NAME}-cpu.json"
    before = json.loads(path.read_text())["rows"] if a.record and path.exists() else []
    found = versions("torch", "onnx", "onnxscript", "tensorrt-rtx")
    result = {"machine": machine, "versions": found, "targets": TARGETS, "rows": before}
    for network in a.networks:
        for row in measure(network, a.size, rows, a.thin, a.timeout):
            marked = row | {"commit": machine["commit"], "date": machine["date"]}
            result["rows"] = merged(result["rows"], marked)
            print(json.dumps(row), file=sys.stderr, flush=True)
            if a.record:
                replace_text(path, json.dumps(result, indent=1) + "\n")
    finish(result, markdown(result))


if __name__ == "__main__":
    main()
