"""The command line; `iqareward --help` lists its commands."""

import io
import json
import shutil
import sys
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from iqareward.cli.text import say

_messages = Console(stderr=True)
RewardNames = Annotated[
    list[str], typer.Option(help='Name of a reward, or a sum such as "0.7*ssim + 0.3*haarpsi"; may be repeated.')
]
Reference = Annotated[
    Path | None,
    typer.Option(help="Folder of references with the same names and any suffix, or one file for all images."),
]
Device = Annotated[str, typer.Option(help="Device to score on, e.g. cuda.")]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Images per batch; fewer if they and their references exceed 512 MiB.")
]


class _Commands(TyperGroup):
    """Refuses empty arguments: an empty path would be the current folder."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if any(not arg or (arg.startswith("--") and arg.endswith("=")) for arg in args):
            ctx.fail("An argument is empty. If it is a shell variable, set it.")
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Image-quality rewards: list them, score and compare images, measure their agreement with people, check your "
    "own, serve them, and train with them.",
)


class Format(StrEnum):
    """File format of scores."""

    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


class TableFormat(StrEnum):
    """Format of the table of a comparison."""

    table = "table"
    markdown = "markdown"
    latex = "latex"
    json = "json"


@contextmanager
def _usage_errors(*more: type[Exception]) -> Generator[None]:
    """Show what was wrong without a traceback, and exit with code 2, as for a mistyped option."""
    try:
        yield
    except BrokenPipeError:  # whoever read the output has seen enough: `| head`
        raise
    except (ValueError, TypeError, ImportError, OSError, *more) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:  # of the system: "[Errno 2] ..."
            text = f"{error.filename}: {error.strerror}"
        first, *rest = text.split("\n")
        say(_messages, first, label="error:", style="red")
        for line in rest:
            say(_messages, line)
        raise typer.Exit(2) from error


def _print_version(wanted: bool) -> None:
    if wanted:
        from iqareward import __version__

        typer.echo(f"iqareward {__version__}")
        raise typer.Exit


_Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")]


@app.callback()
def any_command(version: _Version = False) -> None:
    # Characters that the encoding of a terminal lacks are escaped, as Python does on standard error by itself.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # Pillow warns above 89 megapixels, which a panorama has, and refuses what is twice as large.
    warnings.filterwarnings("ignore", "Image size .* decompression bomb")


@app.command("list")
def list_rewards(
    name: Annotated[str | None, typer.Argument(help="Show the options of this reward, with their defaults.")] = None,
    pyiqa: Annotated[
        bool, typer.Option("--pyiqa", help="List pyiqa's metrics instead (non-commercial licence).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with all facts.")] = False,
) -> None:
    """List the named rewards, or the options of one, one per line. Long lines are cut in a terminal, not in a pipe."""
    from iqareward.cli.doctor import LEGEND, aligned, list_lines, list_rewards
    from iqareward.rewards.catalog import options_of

    if name is not None:
        with _usage_errors():
            rows = [("option", "values", "what it does"), *options_of(name)]
        if as_json:
            typer.echo(json.dumps([dict(zip(rows[0], row, strict=True)) for row in rows[1:]], indent=2))
        else:
            _lines(aligned(rows))
        return
    rows = list_rewards(pyiqa=pyiqa)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    _lines(list_lines(rows))
    if sys.stdout.isatty():
        typer.echo(LEGEND)


def _lines(lines: Iterable[str]) -> None:
    width = shutil.get_terminal_size().columns
    for line in lines:
        cut = sys.stdout.isatty() and len(line) > width
        typer.echo(f"{line[: width - 3]}..." if cut else line)


_ON_RAY = "Data sets (parquet files, WebDataset archives, Hugging Face folders, URLs), on Ray"


@app.command()
def score(
    paths: Annotated[
        list[str], typer.Argument(help="Image files, folders (searched recursively), globs, or data sets.")
    ],
    reward: RewardNames,
    reference: Reference = None,
    output_format: Annotated[
        Format | None, typer.Option("--format", help="Output format; default: table, or that of --output.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Write to this .csv or .jsonl file, or folder of parquet; run again to resume.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --output instead of resuming.")] = False,
    summary: Annotated[
        Path | None, typer.Option(help="Also write mean, std and count to this .csv or .json file.")
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Also show scores on the scale used in papers, where it differs.")
    ] = False,
    device: Device = "cpu",
    batch_size: BatchSize = 8,
    images: Annotated[
        str, typer.Option(help="Column (or suffix in an archive) of images.", rich_help_panel=_ON_RAY)
    ] = "image;jpg;jpeg;png;webp",
    references: Annotated[str | None, typer.Option(help="The same of references.", rich_help_panel=_ON_RAY)] = None,
    inputs: Annotated[str | None, typer.Option(help="The same of degraded images.", rich_help_panel=_ON_RAY)] = None,
    prompts: Annotated[str | None, typer.Option(help="The same of texts.", rich_help_panel=_ON_RAY)] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Column to copy into the results; default: all flat ones.", rich_help_panel=_ON_RAY),
    ] = None,
    num_gpus: Annotated[float, typer.Option(min=0, help="GPUs of a process.", rich_help_panel=_ON_RAY)] = 0.0,
    num_cpus: Annotated[float, typer.Option(min=0, help="CPUs of a process.", rich_help_panel=_ON_RAY)] = 1.0,
    actors: Annotated[
        int | None, typer.Option(min=1, help="Processes; default: all that fit.", rich_help_panel=_ON_RAY)
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, such as auto; default: this machine.", rich_help_panel=_ON_RAY)
    ] = None,
) -> None:
    """Score image files or data sets. Higher is better for every reward.

    Exit codes: 0 = every image has every score; 1 = some scores are missing (the reasons are printed); 2 = the
    command failed.
    """
    from iqareward.cli.score import Job, run
    from iqareward.cli.score_dataset import is_meant, run_dataset

    try:
        with _usage_errors(RuntimeError):
            if is_meant(paths, output_format):
                job = {"images": images, "references": references, "inputs": inputs, "prompts": prompts, "keep": keep}
                job |= {"num_gpus": num_gpus, "num_cpus": num_cpus, "actors": actors, "batch_size": batch_size}
                job |= {"address": address, "overwrite": overwrite}
                unused = {"--reference": reference, "--summary": summary, "--published": published}
                unused |= {"--device": device != "cpu", "--format": output_format not in (None, Format.parquet)}
                complete = run_dataset(paths, reward, output, job, unused, _messages)
            else:
                own = {"--references": references, "--inputs": inputs, "--prompts": prompts, "--keep": keep}
                own |= {"--num-gpus": num_gpus, "--actors": actors, "--address": address}
                if given := [name for name, value in own.items() if value]:
                    raise ValueError(f"{', '.join(given)}: for data sets only. Of a folder --format parquet makes one.")
                file = None if output is None else Path(output)
                job = Job(
                    paths, reward, reference, output_format, file, overwrite, summary, published, device, batch_size
                )
                complete = run(job, _messages)
    except KeyboardInterrupt as stop:
        again = "the same command without --overwrite" if overwrite else "the same command"
        say(_messages, f"Stopped; {again} resumes." if output else "Stopped.")
        raise typer.Exit(130) from stop
    raise typer.Exit(0 if complete else 1)


@app.command()
def check(
    reward: Annotated[
        str,
        typer.Argument(
            help="module:object (a reward, or a class that makes one), or a name shown by `iqareward list`."
        ),
    ],
    images: Annotated[Path | None, typer.Option(help="Folder of photographs; default: generated images.")] = None,
    degraded: Annotated[Path | None, typer.Option(help="Folder of degraded versions with the same file names.")] = None,
    direction: Annotated[bool, typer.Option(help="Check that degraded images score lower.")] = True,
    size: Annotated[int, typer.Option(min=16, help="Side length of the test images in pixels.")] = 224,
) -> None:
    """Test a reward against the whole contract, as iqareward.check_reward does. Exit code 1 if a check fails.

    Without --degraded, the degraded images are coarse and noisy copies.
    """
    from iqareward.cli.check import find_reward, run_check
    from iqareward.testing import RewardContractError

    sys.path.insert(0, str(Path.cwd()))
    with _usage_errors():
        try:
            typer.echo(str(run_check(find_reward(reward), images, size, degraded_folder=degraded, direction=direction)))
        except RewardContractError as failures:
            typer.echo(str(failures))
            raise typer.Exit(1) from failures


@app.command()
def verify(
    rewards: Annotated[
        list[str] | None,
        typer.Argument(help='Names of rewards with weights, such as qalign or "qalign(dtype=float16)".'),
    ] = None,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per reward.")] = False,
) -> None:
    """Run rewards with their published weights, and compare with published scores of published pictures. Without
    names: list what each reward was compared with so far.

    Weights and pictures are downloaded where they are not in the caches. Exit codes: 0 = no figure differs from a
    published one; 1 = one does; 2 = the command failed.
    """
    from iqareward.cli.verify import Verdict, known, known_lines, lines, run

    if not rewards:
        found = [json.dumps(dict(zip(("reward", "state", "evidence", "figure"), row, strict=True))) for row in known()]
        for line in found if as_json else known_lines():
            typer.echo(line)
        return
    verdicts = list[Verdict]()
    for reward in rewards:
        try:
            verdicts.append(run(reward, device))
        except Exception as error:  # a traceback would end with 1, as if a figure differed
            say(_messages, f"{reward}: {error or type(error).__name__}", label="error:", style="red")
        else:
            if as_json:
                typer.echo(json.dumps(verdicts[-1]._asdict()))
    if verdicts and not as_json:
        for line in lines(verdicts):
            typer.echo(line)
    if len(verdicts) < len(rewards):
        raise typer.Exit(2)
    raise typer.Exit(1 if any(found.verdict == "differs" for found in verdicts) else 0)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders with the same file names, the baseline first.")],
    reward: RewardNames,
    reference: Reference = None,
    table_format: Annotated[
        TableFormat, typer.Option("--format", help="Format of the printed table.")
    ] = TableFormat.table,
    per_image: Annotated[
        Path | None, typer.Option(help="Also write the scores of each image to this CSV file.")
    ] = None,
    output: Annotated[Path, typer.Option(help="HTML file for the page of image pairs (at most 32 MiB).")] = Path(
        "comparison.html"
    ),
    pairs: Annotated[int, typer.Option(min=0, help="Number of image pairs on the page.")] = 24,
    device: Device = "cpu",
    batch_size: BatchSize = 8,
) -> None:
    """Compare folders of results with the first one: paired differences with confidence intervals, and a page of
    image pairs.

    Exit code 1 if any images were left out.
    """
    from iqareward.atomic import write_text
    from iqareward.cli.compare import WRITERS, scores_csv, show, summary
    from iqareward.cli.compare import compare as run_comparison
    from iqareward.cli.compare_page import render
    from iqareward.cli.score import check_outputs
    from iqareward.cli.scoring import Scorer

    with _usage_errors():
        check_outputs(per_image, output)
        found = run_comparison(folders, Scorer(reward, reference, device, batch_size), _messages)
        if table_format is TableFormat.table:
            show(found, Console())
        else:
            typer.echo(WRITERS[table_format.value](found), nl=False)
        for line in summary(found.problems):
            say(_messages, line, label="left out:", style="yellow")
        if per_image is not None:
            write_text(per_image, scores_csv(found))
            say(_messages, f"Scores of each image: {per_image}")
        write_text(output, render(found, folder=output.parent, num_pairs=pairs))
        say(_messages, f"Image pairs: {output}")
    raise typer.Exit(1 if found.problems else 0)


@app.command()
def agree(
    table: Annotated[
        str,
        typer.Argument(
            help="Table (.csv, .tsv, .jsonl, .parquet), qualisr (in this package), or a data set with its folder: "
            "kadid10k:DIR, tid2013:DIR, koniq10k:DIR, pipal:DIR, spaq:DIR, live_challenge:DIR."
        ),
    ],
    human: Annotated[str | None, typer.Option(help="Column of human scores.")] = None,
    group: Annotated[str | None, typer.Option(help="Column that names the input of each image.")] = None,
    score: Annotated[list[str] | None, typer.Option(help="Column of scores; may be repeated.")] = None,
    reward: Annotated[
        list[str] | None, typer.Option(help="Name of a reward that scores the images; may be repeated.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="Column of image files; default: image.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where relative paths of images start; default: the table's folder.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Column of references, a folder with the same paths, or one file for all images.")
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="Column, such as a method, within whose values to measure too.")
    ] = None,
    lower_is_better: Annotated[
        list[str] | None,
        typer.Option(help="Column of --score or --human that falls as quality rises; may be repeated."),
    ] = None,
    higher_is_better: Annotated[
        list[str] | None, typer.Option(help="Column of --score that rises with quality; may be repeated.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="Metric to compare with; default: the best.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use every n-th input, so that about this many remain.")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="Keep scores of --reward in this .csv or .jsonl file; run again to resume.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --scores instead of resuming.")] = False,
    resamples: Annotated[int, typer.Option(min=100, help="Number of bootstrap samples.")] = 2_000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    output: Annotated[
        list[Path] | None, typer.Option(help="Also write this .json, .csv, .html or .svg file; may be repeated.")
    ] = None,
    device: Device = "cpu",
    batch_size: BatchSize = 8,
) -> None:
    """Measure how metrics and rewards agree with human scores, also within the outputs of one input.

    Exit codes: 0 = every rated image has every score; 1 = some scores are missing; 2 = the command failed.
    """
    from iqareward.atomic import write_text
    from iqareward.cli.agree import Request, as_csv, as_json, is_complete, run, show
    from iqareward.cli.agree_page import picture, render
    from iqareward.cli.score import check_outputs

    writers = {".json": as_json, ".csv": as_csv, ".html": render, ".svg": picture}
    with _usage_errors():
        for file in output or []:
            if file.suffix.lower() not in writers:
                raise ValueError(f"--output {file}: give it the suffix .json, .csv, .html or .svg.")
        check_outputs(scores, *(output or []))
        request = Request(
            table, human, group, score or [], reward or [], image, folder, reference, by, lower_is_better or [],
            higher_is_better or [], baseline, limit, scores, overwrite, resamples, seed, device, batch_size,
        )  # fmt: skip
        found = run(request, _messages)
        show(found, Console())
        for file in output or []:
            write_text(file, writers[file.suffix.lower()](found))
            say(_messages, f"Written: {file}")
    raise typer.Exit(0 if is_complete(found) else 1)


@app.command()
def monitor(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder with a sub-folder per step, such as step_0100, each with the same file names."),
    ],
    reward: Annotated[
        str | None, typer.Option(help="Name of the trained reward, or a sum; alarms then need that it rose.")
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(help="Name of a reward that is not trained on; may be repeated.")
    ] = None,
    reference: Reference = None,
    baseline: Annotated[
        int | None, typer.Option(help="Step to compare with, before RL; default: the first. Earlier ones are left out.")
    ] = None,
    patience: Annotated[
        int, typer.Option(min=1, help="Steps in a row that must find the same change before it is an alarm.")
    ] = 2,
    effect: Annotated[
        float, typer.Option(min=1e-6, help="Smallest change that matters, in standard deviations over the images.")
    ] = 0.1,
    output_format: Annotated[Format, typer.Option("--format", help="Format of what is printed.")] = Format.table,
    output: Annotated[Path | None, typer.Option(help="HTML file for the charts over the steps, with images.")] = None,
    device: Device = "cpu",
    batch_size: BatchSize = 8,
) -> None:
    """Find reward hacking in samples of several steps: compare held-out rewards and image statistics with the first.

    Exit codes: 0 = no alarm; 1 = no alarm, but files were left out; 2 = the command failed; 3 = an alarm.
    """
    from iqareward.atomic import write_text
    from iqareward.cli.compare import summary
    from iqareward.cli.monitor import Job, as_csv, as_json, run, show
    from iqareward.cli.monitor_page import render
    from iqareward.cli.score import check_outputs

    with _usage_errors():
        check_outputs(output)
        job = Job(folder, reward, held_out or [], reference, baseline, patience, effect, device, batch_size)
        found = run(job, _messages)
        if output_format is Format.table:
            show(found, Console())
        else:
            typer.echo(as_json(found) if output_format is Format.json else as_csv(found), nl=False)
        for line in summary(found.problems):
            say(_messages, line, label="left out:", style="yellow")
        if output is not None:
            write_text(output, render(found, folder))
            say(_messages, f"Charts: {output}")
    raise typer.Exit(3 if found.alarms else 1 if found.problems else 0)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Check packages, devices and rewards, and print the commands that install whatever is missing.

    Exit code 1 if an installed package is broken or too old.
    """
    from iqareward.cli.doctor import diagnose, show

    with _messages.status("Importing every package once"):
        findings = diagnose()
    if as_json:
        typer.echo(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        show(findings, Console())
    raise typer.Exit(1 if any(finding.state in ("broken", "old") for finding in findings) else 0)


@app.command()
def train(
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file with the settings; --example prints one. Python files that it names are run."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in the folder named by the setting `output`.")
    ] = False,
    example: Annotated[
        bool, typer.Option("--example", help="Print an example file with all settings and exit.")
    ] = False,
) -> None:
    """Train a restoration model on your images: SFT, then difficulty-adaptive RL with rewards of your choice."""
    from iqareward.cli.train import EXAMPLE, run
    from iqareward.diffusion import TrainingError

    if example:
        typer.echo(EXAMPLE.read_text(encoding="utf-8"), nl=False)
        return
    try:
        with _usage_errors():
            if config is None:
                raise ValueError("pass --config FILE; `iqareward train --example > FILE` writes one to start from.")
            run(config, _messages, resume=resume)
    except TrainingError as error:
        say(_messages, error, label="stopped:", style="red")
        raise typer.Exit(1) from error
    except KeyboardInterrupt as stop:
        say(_messages, "Stopped. --resume continues from the last checkpoint; unfinished SFT starts again.")
        raise typer.Exit(130) from stop


@app.command()
def serve(
    rewards: Annotated[
        list[str], typer.Argument(help='Names of rewards or sums, e.g. qalign or "0.7*qalign + 0.3*ssim".')
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 = all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    address: Annotated[
        str | None, typer.Option(help="Address of a running Ray cluster, or auto; default: start a local one.")
    ] = None,
    replicas: Annotated[str, typer.Option(help="Number of processes per reward, or auto.")] = "auto",
    num_gpus: Annotated[
        float, typer.Option(min=0, help="GPUs per process; 0.5 = two processes share one, 0 = CPU.")
    ] = 0,
    num_cpus: Annotated[float, typer.Option(min=0, help="CPUs, and threads, per process.")] = 1,
    max_batch: Annotated[int, typer.Option(min=1, help="Maximum number of images in a batch.")] = 32,
    max_wait_ms: Annotated[
        float, typer.Option(min=0, help="Maximum time to wait for more requests before a batch is scored.")
    ] = 5,
    max_body_mib: Annotated[int, typer.Option(min=1, help="Maximum size of a request in MiB.")] = 256,
    max_images: Annotated[int, typer.Option(min=1, help="Maximum number of images in a request.")] = 1024,
    deadline: Annotated[float, typer.Option(min=0.1, help="Time limit of a request in seconds.")] = 120,
    jpeg: Annotated[str, typer.Option(help="Accept JPEG files: never or always.")] = "never",
    start_timeout: Annotated[
        float, typer.Option(min=1, help="Maximum time to wait for all processes to start, in seconds.")
    ] = 1800,
    token_env: Annotated[
        str,
        typer.Option(
            help="Environment variable that holds the token clients must send; if it is unset, none is needed."
        ),
    ] = "IQAREWARD_TOKEN",
) -> None:
    """Serve rewards over HTTP with Ray Serve until Ctrl-C. With --address, deploy them to that cluster and exit."""
    from iqareward.cli.serve import Job, run

    job = Job(
        rewards, host, port, address, replicas, num_gpus, num_cpus, max_batch, max_wait_ms, max_body_mib, max_images,
        deadline, jpeg, start_timeout, token_env,
    )  # fmt: skip
    with _usage_errors(RuntimeError):
        run(job, _messages)
