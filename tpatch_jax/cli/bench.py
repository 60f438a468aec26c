"""``tpatch bench``: runs the benchmark and shows it."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from tpatch_jax.cli.common import Dtype, Json, Quiet, load, show_rows
from tpatch_jax.display.console import print_json, progress_bar, result_console
from tpatch_jax.errors import TPatchError

__all__ = ["Bench"]


@dataclass(frozen=True)
class Bench:
    """Measure what editing costs: time, memory, generation, compilations, beside the paper's loop."""

    model: Annotated[Positional[str], arg(metavar="MODEL", help="a decoder, as `tpatch models` names it")] = (
        "smollm2-135m"
    )
    _: KW_ONLY
    file: Annotated[str | None, arg(metavar="FILE", help="edits: requests or CounterFact; by default made up")] = None
    output: Annotated[str | None, arg(aliases=["-o"], metavar="PICTURE", help="also draw it, e.g. bench.png")] = None
    quick: Annotated[bool, arg(help="fewer edits and repeats: under five minutes on two CPU cores")] = False
    plan: Annotated[bool, arg(help="measure nothing: what many edits of large models would cost, on paper")] = False
    topology: Annotated[
        str | None,
        arg(metavar="CHIPS", help="with --plan: compile MODEL, a shape such as Llama-3-8B, for TPUs such as v5e:2x4"),
    ] = None
    programs: Annotated[
        bool, arg(help="with --plan: only name every program that edits of MODEL, a shape, run; compile none")
    ] = False
    device: Annotated[
        bool, arg(help="edit on the accelerator that is here, beside what its compiled programs take at the least")
    ] = False
    edits: Annotated[
        tuple[int, ...] | None,
        arg(metavar="N", help="with --topology or --device: how many edits in a call; 1 100 10000, or 1 16 256"),
    ] = None
    every: Annotated[
        bool, arg(help="with --topology: other methods, generation and evaluation as well, which takes longer")
    ] = False
    against: Annotated[
        str | None, arg(metavar="FOLDER", help="time the same edits in another checkout of this library, side by side")
    ] = None
    dtype: Dtype = None
    json: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Measure, print a table, and draw a picture if one is asked for; or show what it would cost elsewhere."""
        beside = {
            "topology": ("plan", self.plan),
            "programs": ("plan", self.plan),
            "edits": ("topology or --device", self.topology or self.device),
            "every": ("topology", self.topology),
        }
        for name, (other, there) in beside.items():
            if getattr(self, name) and not there:
                raise TPatchError(f"--{name} goes with --{other}; give both, or leave it out")
        if self.programs and self.topology:
            raise TPatchError("--programs compiles nothing, so it goes without --topology; leave one of them out")
        if self.edits and min(self.edits) < 1:
            raise TPatchError(f"--edits is {min(self.edits)}; give whole numbers, 1 or more")
        if self.device:
            self._run_on_device()
        elif self.against is not None:
            self._compare(self.against)
        elif self.topology is not None:
            self._compile(self.topology)
        elif self.programs:
            self._list()
        elif self.plan:
            _show_plan(self.json)
        else:
            self._measure()

    def _compile(self, topology: str) -> None:
        from tpatch_jax.benchmarks.compiled_plan import EDITS, compile_plan
        from tpatch_jax.benchmarks.network_shapes import network_shape

        for name, given in (("output", self.output), ("file", self.file), ("quick", self.quick)):
            if given:
                raise TPatchError(f"--topology goes without --{name}; leave one of them out")
        edits = self.edits or EDITS
        name, config = network_shape(self.model)
        with progress_bar(self.quiet or self.json) as report:
            result = compile_plan(
                name, config, topology, dtype=self.dtype or "bfloat16", edits=edits, every=self.every, progress=report
            )
        if self.json:
            print_json(result)
        else:
            _show_compiled(result)

    def _list(self) -> None:
        from tpatch_jax.benchmarks.compiled_plan import list_programs
        from tpatch_jax.benchmarks.network_shapes import network_shape

        name, config = network_shape(self.model)
        programs = list_programs(config)
        if self.json:
            print_json({"model": name, "programs": programs})
            return
        sites = sorted({site for program in programs for site in program["runs"]}, reverse=True)
        runs = [[f"{each['runs'][site]:,.0f}" if site in each["runs"] else "" for site in sites] for each in programs]
        rows = [[each["name"], *times] for each, times in zip(programs, runs, strict=True)]
        show_rows(f"programs of {name}, and how often 100 edits run them", [["", *sites], *rows])

    def _run_on_device(self) -> None:
        from tpatch_jax.benchmarks.on_device import bench_device

        for name, given in (("plan", self.plan), ("against", self.against), ("output", self.output)):
            if given:
                raise TPatchError(f"--device goes without --{name}; leave one of them out")
        edits, repeats = self.edits or ((1, 16) if self.quick else (1, 16, 256)), 1 if self.quick else 3
        with progress_bar(self.quiet or self.json) as report:
            result = bench_device(self.model, edits, repeats, self.file, self.dtype, report)
        if self.json:
            print_json(result)
        if not result["ran"]:
            raise TPatchError(f"{result['reason']}; on a machine with one install JAX for it, such as jax[cuda12]")
        if not self.json:
            _show_device(result)

    def _compare(self, folder: str) -> None:
        from tpatch_jax.benchmarks.side_by_side import FULL, QUICK, check_build, compare_builds

        if self.plan or self.output:
            raise TPatchError(f"--against goes without {'--plan' if self.plan else '--output'}; leave one of them out")
        check_build(folder)
        plan = QUICK if self.quick else FULL
        with progress_bar(self.quiet or self.json) as report:
            result = compare_builds(folder, self.model, plan, self.file, self.dtype, report)
        if self.json:
            print_json(result)
        else:
            _show_builds(result, folder)

    def _measure(self) -> None:
        from tpatch_jax.benchmarks.bench import FULL, QUICK, bench
        from tpatch_jax.benchmarks.edits_to_time import edits_to_time
        from tpatch_jax.benchmarks.picture import check_picture, draw_bench

        picture = Path(self.output) if self.output else None
        if picture and not picture.absolute().parent.is_dir():
            raise TPatchError(f"the folder of {self.output} does not exist; make it first")
        if picture:
            check_picture(picture)
        plan = QUICK if self.quick else FULL
        # A file that is too short would end it at the last, so it is read first.
        counts = (*plan.edits.values(), plan.warm, plan.new, [plan.compared])
        edits_to_time(max(map(max, counts)), self.file)
        model = load(self.model, self.dtype, self.quiet or self.json)
        if model.config.architecture != "decoder":
            raise TPatchError(f"{self.model!r} is an {model.config.architecture}; the benchmark needs a decoder")
        with progress_bar(self.quiet or self.json) as report:
            result = bench(model, self.model, plan, self.file, self.dtype, report)
        # Before the picture, which may not come off.
        if self.json:
            print_json(result)
        else:
            _show(result)
        if picture:
            draw_bench(picture, result)


def _show(result: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    console = result_console()
    table = Table(title=Text(f"editing {result['model']} on {result['device']}"), title_justify="left")
    columns = ("site", "edits", "fit", "all", "middle half", "seconds per edit", "peak memory", "exact", "locality")
    for column in columns:
        table.add_column(column, justify="left" if column == "site" else "right")
    for site, by_count in result["forward_equivalents_per_edit"].items():
        for count, value in by_count.items():
            spread, tokens = result["spread"][site][count], result["locality_tokens"][site][count]
            table.add_row(
                site,
                count,
                f"{result['fit_forward_equivalents_per_edit'][site][count]:.1f}",
                f"{value:.1f}",
                f"{spread['lower']:.1f}-{spread['upper']:.1f}",
                f"{result['seconds_per_edit'][site][count]:.3f}",
                f"{result['peak_memory'][site][count] / 2**30:.2f} GiB",
                f"{result['exact'][site][count]:.3f}",
                "" if tokens is None else f"{tokens:.4f}",
            )
    table.caption = "fit, all: forward equivalents per edit"
    console.print(table)
    table = Table(title="generation over that without neurons", title_justify="left")
    table.add_column("neurons", justify="right")
    for form in ("attached", "merged"):
        table.add_column(form, justify="right")
    for count, value in result["attached_overhead"].items():
        table.add_row(count, f"{value:.3f}", f"{result['merged_overhead'][count]:.3f}")
    console.print(table)
    speed, paper = result["speedup_over_paper_loop"], result["paper_loop"]
    steps = "as many steps as its stopping rule takes" if paper["steps_followed"] else "the fewest steps that it allows"
    console.print(
        f"the paper's loop, {paper['counted']} edits, {steps}: {paper['paper_seconds']:.0f} s, {speed['single']:.0f} "
        f"times one by one, {speed['batch']:.0f} times together ({paper['steps_timed']} steps timed)"
    )
    console.print(
        f"peak memory of the most edits over that of 16: {result['peak_memory_ratio']:.2f}; programs compiled for new "
        f"numbers of edits: {result['recompilations']}; {result['seconds']:.0f} s in all"
    )


def _show_builds(result: dict[str, Any], folder: str) -> None:
    """Show what edits cost in this build and in another one."""
    rows = [["", "CPU seconds per edit", "other", "ratio", "first call", "other", "peak GiB", "other", "held", "other"]]
    for site, by_count in result["edits"].items():
        for count, figures in by_count.items():
            time, first = figures["cpu_seconds_per_edit"], figures["first_cpu_seconds"]
            peak, held = figures["peak_memory"], figures["held"]
            cells = [f"{time['this']:.2f}", f"{time['other']:.2f}", f"{time['ratio']:.3f}"]
            cells += [f"{first['this']:.2f}", f"{first['other']:.2f}"]
            cells += [f"{peak[build] / 2**30:.2f}" for build in ("this", "other")]
            cells += [f"{held[build]:.2f}" for build in ("this", "other")]
            rows.append([f"{site}, {count} in a call", *cells])
    show_rows(f"editing {result['model']} on {result['device']}: this build, and the other one in {folder}", rows)


def _show_compiled(result: dict[str, Any]) -> None:
    """Show what compiled programs say editing would cost."""
    from rich.table import Table

    console = result_console()
    mesh = " x ".join(f"{size} {axis}" for axis, size in result["mesh"].items())
    title = f"{result['model']} in {result['dtype']} on {result['topology']} ({mesh}): compiled, not run"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    columns = ("program", "edits", "GiB", "fits", "GFLOP", "MB", "sent MB", "ms", "bound", "compiled in")
    for column in columns:
        table.add_column(column, justify="left" if column in ("program", "bound") else "right")
    for row in result["programs"]:
        edits = str(row.get("edits", ""))
        if not row["compiled"]:
            table.add_row(row["name"], edits, "", "no", "", "", "", "", row["error"], "")
            continue
        numbers = (row["flops"] / 1e9, row["bytes"] / 1e6, row["collective_bytes"] / 1e6, row["seconds"] * 1e3)
        table.add_row(
            row["name"],
            edits,
            f"{row['memory_bytes_per_chip'] / 2**30:.2f}",
            "yes" if row["fits"] else "no",
            *(f"{number:,.1f}" for number in numbers),
            row["bound"],
            f"{row['compile_seconds']:.1f} s",
        )
    table.caption = (
        "of one run on one chip; memory with all weights; ms and what bounds it at the chip's published peaks"
    )
    console.print(table)
    table = Table(title="whole edits", title_justify="left", box=None, padding=(0, 2, 0, 0))
    columns = ("site", "edits in a call", "GiB of a chip", "fits", "edits per second", "forward equivalents per edit")
    for column in columns:
        table.add_column(column, justify="left" if column == "site" else "right")
    for site, by_count in result["plan"].items():
        for count, figures in by_count.items():
            if figures["seconds"] is None:
                table.add_row(site, count, "", "no", "", "")
                continue
            memory = f"{figures['memory_bytes_per_chip'] / 2**30:.2f}"
            forwards = figures["forward_equivalents"]
            shown = "" if forwards is None else f"{forwards:.1f}"
            fits = "yes" if figures["fits"] else "no"
            table.add_row(site, count, memory, fits, f"{figures['edits_per_second']:.1f}", shown)
    console.print(table)


def _show_device(result: dict[str, Any]) -> None:
    """Show what edits cost on an accelerator, and what its compiled programs say they take at the least."""
    where, rows = result["accelerator"], []
    rows.append(["", "edits", "ms per edit", "at least", "peak GiB", "compiled", "exact", "locality"])
    for site, by_count in result["edits"].items():
        for count, figures in by_count.items():
            least = figures["predicted"] or {}
            sizes = (figures["peak_memory_bytes"], least.get("memory_bytes_per_chip"))
            peak, compiled = ("" if size is None else f"{size / 2**30:.2f}" for size in sizes)
            times = (figures["ms_per_edit"], least.get("ms_per_edit"))
            taken, bound = ("" if time is None else f"{time:.1f}" for time in times)
            locality = figures["locality_tokens"]
            shown = "" if locality is None else f"{locality:.4f}"
            rows.append([site, count, taken, bound, peak, compiled, f"{figures['exact']:.3f}", shown])
    title = f"editing {result['model']} in {result['dtype']} on {where['devices']} x {where['kind']}"
    show_rows(f"{title}; 'at least' and 'compiled' are what the compiled programs say", rows)


def _show_plan(json: bool) -> None:
    """Show what many edits of large models would cost."""
    from rich.table import Table

    from tpatch_jax.benchmarks.plan import GIB, MEASURED, plan

    costs = plan()
    if json:
        print_json({"measured": MEASURED._asdict(), "plan": [cost._asdict() for cost in costs]})
        return
    table = Table(title="edits in the last layer, on paper", title_justify="left", box=None, padding=(0, 2, 0, 0))
    columns = ("model", "machine", "edits", "time", "weights", "rows", "neurons", "disk", "wider", "fits")
    for column in columns:
        table.add_column(column, justify="left" if column in ("model", "machine") else "right", no_wrap=True)
    for cost in costs:
        sizes = (f"{size / GIB:.1f}" for size in (cost.weights, cost.memory, cost.patches, cost.disk))
        time = f"{cost.seconds:.0f} s" if cost.seconds < 600 else f"{cost.seconds / 60:.0f} min"
        fits = "yes" if cost.fits else "no"
        table.add_row(cost.network, cost.machine, f"{cost.edits // 1000}k", time, *sizes, f"{cost.wider:.0%}", fits)
    table.caption = (
        "GiB of each device for weights, memory rows and merged neurons, of each process in files for what it reads; "
        "wider: merged neurons over weights"
    )
    result_console().print(table)
