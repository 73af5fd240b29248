"""The command line; `iqareward --help` lists its commands."""

import io
import json
import shutil
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from iqareward.cli.text import say

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Image-quality rewards: list them, score files with them, check your own, train with them.",
)
_messages = Console(stderr=True)


class Format(StrEnum):
    """How results are written."""

    table = "table"
    csv = "csv"
    json = "json"


def _print_version(wanted: bool) -> None:
    if wanted:
        from iqareward import __version__

        typer.echo(f"iqareward {__version__}")
        raise typer.Exit


@app.callback()
def any_command(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    # What a terminal cannot encode is shown escaped, as Python does on standard error by itself.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # Pillow warns above 89 megapixels, which a panorama has, and refuses what is twice as large.
    warnings.filterwarnings("ignore", "Image size .* decompression bomb")


@app.command("list")
def list_rewards(
    pyiqa: Annotated[bool, typer.Option("--pyiqa", help="pyiqa's metrics instead (non-commercial licence).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, with everything that is known.")] = False,
) -> None:
    """List every reward that has a name, one line each. A terminal cuts the lines; in a pipe they are whole."""
    from iqareward.cli.listing import LEGEND, facts, lines

    rows = facts(pyiqa=pyiqa)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    width = shutil.get_terminal_size().columns
    for line in lines(rows):
        cut = sys.stdout.isatty() and len(line) > width
        typer.echo(f"{line[: width - 3]}..." if cut else line)
    if sys.stdout.isatty():
        typer.echo(LEGEND)


@app.command()
def score(
    paths: Annotated[list[str], typer.Argument(help="Image files, folders (searched recursively) or globs.")],
    reward: Annotated[list[str], typer.Option(help='A name or a sum, e.g. "0.7*ssim + 0.3*haarpsi"; may be repeated.')],
    reference: Annotated[
        Path | None,
        typer.Option(help="Folder of references with the same names (any image suffix), or one picture for all."),
    ] = None,
    format: Annotated[Format | None, typer.Option(help="Default: table, or as the suffix of --output says.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write here picture by picture (.csv, or .jsonl: an object a line); run again to go on."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin --output anew.")] = False,
    summary: Annotated[
        Path | None, typer.Option(help="Write mean, standard deviation and count here too (.csv or .json).")
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Add what papers print where it differs, e.g. niqe: lower is better.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where to score, e.g. cuda.")] = "cpu",
    batch_size: Annotated[
        int,
        typer.Option(min=1, help="Images per batch; fewer where they take over 512 MiB as float32 with references."),
    ] = 8,
) -> None:
    """Score image files: higher is better.

    Exit code 0: every picture has every score. 1: some are missing, and a line says why. 2: it could not be done.
    """
    from iqareward.cli.score import Job, run

    job = Job(paths, reward, reference, format, output, overwrite, summary, published, device, batch_size)
    try:
        complete = run(job, _messages)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise _usage_error(error) from error
    except KeyboardInterrupt as stop:
        again = "the same command without --overwrite" if overwrite else "the same command"
        say(_messages, f"Stopped; {again} goes on." if output else "Stopped.")
        raise typer.Exit(130) from stop
    raise typer.Exit(0 if complete else 1)


@app.command()
def check(
    reward: Annotated[str, typer.Argument(help="module:object (a reward, or a class to call), or a name of `list`.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder whose first four photographs are used; default: generated pictures.")
    ] = None,
    degraded: Annotated[
        Path | None, typer.Option(help="Folder of worse versions of --images, with the same file names.")
    ] = None,
    direction: Annotated[
        bool, typer.Option("--direction/--no-direction", help="Check that worse images score lower.")
    ] = True,
    size: Annotated[int, typer.Option(min=16, help="Side of the test images in pixels.")] = 224,
) -> None:
    """Test a reward against the whole contract (iqareward.check_reward). Exit code 1 if it breaks it.

    Worse images are coarse and noisy versions, unless --degraded brings others.
    """
    from iqareward.cli.check import find_reward, run_check
    from iqareward.testing import RewardContractError

    sys.path.insert(0, str(Path.cwd()))
    try:
        report = run_check(find_reward(reward), images, size, degraded_folder=degraded, direction=direction)
    except RewardContractError as failures:
        typer.echo(str(failures))
        raise typer.Exit(1) from failures
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise _usage_error(error) from error
    typer.echo(str(report))


class TableFormat(StrEnum):
    """How a comparison is printed."""

    table = "table"
    markdown = "markdown"
    latex = "latex"
    json = "json"


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders with the same file names, the baseline first.")],
    reward: Annotated[list[str], typer.Option(help='A name or a sum, e.g. "0.7*ssim + 0.3*haarpsi"; may be repeated.')],
    reference: Annotated[Path | None, typer.Option(help="Folder of references with the same names.")] = None,
    format: Annotated[
        TableFormat, typer.Option(metavar="FORMAT", help="table, markdown, latex or json.")
    ] = TableFormat.table,
    per_image: Annotated[Path | None, typer.Option(help="Write the scores of each image here, as CSV.")] = None,
    output: Annotated[Path, typer.Option(help="Page with the pairs, at most 32 MiB.")] = Path("comparison.html"),
    pairs: Annotated[int, typer.Option(min=0, help="Pairs on the page.")] = 24,
    device: Annotated[str, typer.Option(help="Where to score, e.g. cuda.")] = "cpu",
    batch_size: Annotated[
        int,
        typer.Option(min=1, help="Images per batch; fewer where they take over 512 MiB as float32 with references."),
    ] = 8,
) -> None:
    """Compare folders of results with the first: paired differences with intervals, and a page of pairs to look at.

    Exit code 1 if some images were left out.
    """
    from iqareward.atomic import write_text
    from iqareward.cli.compare import WRITERS, Scoring, scores_csv, show, summary
    from iqareward.cli.compare import compare as run_comparison
    from iqareward.cli.compare_page import render
    from iqareward.cli.score import check_outputs

    try:
        check_outputs(per_image, output)
        found = run_comparison(folders, Scoring(reward, reference, device, batch_size, _messages))
        if format is TableFormat.table:
            show(found, Console())
        else:
            typer.echo(WRITERS[format.value](found), nl=False)
        for line in summary(found.problems):
            say(_messages, line, label="left out:", style="yellow")
        if per_image is not None:
            write_text(per_image, scores_csv(found))
            say(_messages, f"Scores of each image: {per_image}")
        write_text(output, render(found, folder=output.parent, num_pairs=pairs))
        say(_messages, f"Pairs to look at: {output}")
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise _usage_error(error) from error
    raise typer.Exit(1 if found.problems else 0)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list instead of tables.")] = False,
) -> None:
    """Say what works here, what does not, and the command that mends it. Exit code 1 if something is broken."""
    from iqareward.cli.doctor import diagnose, show

    with _messages.status("Importing every package, once"):
        findings = diagnose()
    if as_json:
        typer.echo(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        show(findings, Console())
    raise typer.Exit(1 if any(finding.state in ("broken", "old") for finding in findings) else 0)


@app.command()
def train(
    config: Annotated[Path | None, typer.Option(help="The settings, a TOML file.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder `output`.")] = False,
    example: Annotated[bool, typer.Option("--example", help="Print a file with all settings, and do nothing.")] = False,
) -> None:
    """Train a restorer on a folder of images: SFT, then difficulty-adaptive RL with a reward of your choice."""
    from iqareward.cli.train import EXAMPLE, run
    from iqareward.diffusion import TrainingError

    if example:
        typer.echo(EXAMPLE.read_text(encoding="utf-8"), nl=False)
        return
    if config is None:
        raise _usage_error(
            ValueError("pass --config FILE; `iqareward train --example > FILE` writes one to start from.")
        )
    try:
        run(config, _messages, resume=resume)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise _usage_error(error) from error
    except TrainingError as error:
        say(_messages, error, label="stopped:", style="red")
        raise typer.Exit(1) from error
    except KeyboardInterrupt as stop:
        say(_messages, "Stopped. --resume goes on from the last checkpoint; unfinished SFT starts again.")
        raise typer.Exit(130) from stop


@app.command()
def serve(
    rewards: Annotated[list[str], typer.Argument(help='Names or sums, e.g. qalign or "0.7*qalign + 0.3*ssim".')],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 = all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster, or auto; default: one of its own.")
    ] = None,
    replicas: Annotated[str, typer.Option(help="Processes of each reward, or auto.")] = "auto",
    num_gpus: Annotated[float, typer.Option(min=0, help="GPUs of a process; 0.5 = two share one, 0 = CPU.")] = 0,
    num_cpus: Annotated[float, typer.Option(min=0, help="CPUs of a process, and its threads.")] = 1,
    max_batch: Annotated[int, typer.Option(min=1, help="Most images in a batch.")] = 32,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="Longest wait for more requests in a batch.")] = 5,
    max_body_mib: Annotated[int, typer.Option(min=1, help="Largest request in MiB.")] = 256,
    max_images: Annotated[int, typer.Option(min=1, help="Most images in a request.")] = 1024,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds until a request is given up.")] = 120,
    jpeg: Annotated[str, typer.Option(help="Score JPEG files: never or always.")] = "never",
    token_env: Annotated[
        str, typer.Option(help="Environment variable with the token that clients must send, if it is set.")
    ] = "IQAREWARD_TOKEN",
) -> None:
    """Serve rewards over HTTP with Ray Serve, until Ctrl-C. With --address, deploy them there and return."""
    from iqareward.cli.serve import Job, run

    job = Job(
        rewards, host, port, address, replicas, num_gpus, num_cpus, max_batch, max_wait_ms, max_body_mib, max_images,
        deadline, jpeg, token_env,
    )  # fmt: skip
    try:
        run(job, _messages)
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        raise _usage_error(error) from error


def _usage_error(error: Exception) -> typer.Exit:
    """Show what was wrong without a traceback; exit code 2, as for a mistyped option."""
    if isinstance(error, BrokenPipeError):  # whoever read the output has seen enough: `| head`
        raise error
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:  # of the system: "[Errno 2] ..."
        text = f"{error.filename}: {error.strerror}"
    first, *rest = text.split("\n")
    say(_messages, first, label="error:", style="red")
    for line in rest:
        say(_messages, line)
    return typer.Exit(2)
