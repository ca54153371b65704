"""The `pbsp` command: each subcommand parses, makes one library call and prints what it returned."""

import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from pbsp.errors import PbspError
from pbsp.torchrun import check_command, speaks, watch_end

app = typer.Typer(
    name="pbsp",
    help="Compress large language models after training to N:M binary planes, in files that are that small.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_INTERRUPTED = 130

Model = Annotated[str, typer.Argument(help="Folder, Hub id, .gguf file, or smollm2-135m.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
_SEED_HELP = "Of sampling and of the choice of text windows."
Seed = Annotated[int, typer.Option(help=_SEED_HELP)]
TextSeed = Annotated[int | None, typer.Option(help=_SEED_HELP)]
Calibration = Annotated[str | None, typer.Option(help="self, c4, wikitext2 or a text file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the model in the output folder.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on where an interrupted run stopped (OUTPUT.unfinished).")
]


def main(arguments: list[str] | None = None) -> None:
    """Run the command; a user's error is one line on stderr and exit code 2."""
    command = typer.main.get_command(app)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        check_command(arguments)
        watch_end()
        code = command.main(arguments or ["--help"], prog_name="pbsp", standalone_mode=False)
    except PbspError as error:
        code = _fail(str(error))
    except TyperException as error:
        context = getattr(error, "ctx", None)  # only usage errors know which command was meant
        command_path = context.command_path if context else "pbsp"
        code = _fail(f"{error.format_message().rstrip('.')}; see {command_path} --help")
    if code == _INTERRUPTED and speaks():  # typer's code for Ctrl-C, about which it says nothing
        print("pbsp: interrupted; no half-written output is left", file=sys.stderr)
    sys.exit(code or 0)


def _fail(message: str) -> int:
    if speaks():
        print(f"pbsp: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 2


def _print_version(wanted: bool) -> bool:
    if wanted:
        from pbsp import __version__

        print(f"pbsp {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """What stands before a subcommand."""


@app.command()
def compress(
    model: Model,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder to write; new or empty, see --overwrite.")
    ] = None,
    bits: Annotated[
        float | None, typer.Option(help="At most so many stored bits per weight, where they matter most.")
    ] = None,
    file_size: Annotated[
        str | None, typer.Option(help="At most so large weight files, as 60MB; instead of --bits.")
    ] = None,
    plan: Annotated[str | None, typer.Option(help="The plan.toml of a compressed model, to replay.")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="Planes of all layers, N:M or e8-BITS, joined by +: 4:8+2:8.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="planes; pbsp, the paper's own, one N:M; stbllm. See `pbsp compare`.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE, a hyperparameter of the method, as block=64; repeatable."),
    ] = None,
    weighting: Annotated[
        str | None, typer.Option(help="Of tokens in moments: plain, attention, gradient or squares.")
    ] = None,
    allocation: Annotated[
        str | None, typer.Option(help="uniform; paper, N by block importance; outliers, by STBLLM's rule.")
    ] = None,
    spread: Annotated[int | None, typer.Option(help="N ± spread in those allocations.")] = None,
    inputs: Annotated[str | None, typer.Option(help="Measure behind compressed or original blocks.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of what stays uncompressed: auto, float16, bfloat16.")
    ] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="Bits of embeddings and head: auto, 16, 8, 4.")
    ] = None,
    recover: Annotated[
        str | None,
        typer.Option(help="block: tune each block as it is compressed; model: the whole at the end; both."),
    ] = None,
    strict: Annotated[
        bool | None, typer.Option("--strict/--no-strict", help="Refuse layers that cannot take it.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="TOML file with these options; the command line wins.")
    ] = None,
    calibration: Calibration = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a calibration window.")] = None,
    seed: TextSeed = None,
    device: Device = "auto",
    memory: Annotated[
        str, typer.Option(help="Hold the whole model, or blocks: one decoder block at a time; or auto.")
    ] = "auto",
    overwrite: Overwrite = False,
    resume: Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the size to the byte; write nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Compress MODEL and write it to a folder that transformers loads."""
    from pbsp.commands.compress import run_compress

    settings = {
        "bits": bits,
        "file_size": file_size,
        "plan": plan,
        "method": method,
        "pattern": pattern,
        "weighting": weighting,
        "allocation": allocation,
        "spread": spread,
        "inputs": inputs,
        "dtype": dtype,
        "embeddings": embeddings,
        "recover": recover,
        "strict": strict,
    }
    text = {"calibration": calibration, "samples": samples, "context": context, "seed": seed}
    run_compress(
        model,
        output,
        settings={name: value for name, value in settings.items() if value is not None},
        hyperparameters=set_ or [],
        text={name: value for name, value in text.items() if value is not None},
        config_file=config,
        device=device,
        memory=memory,
        overwrite=overwrite,
        resume=resume,
        dry_run=dry_run,
        json=json,
    )


@app.command()
def evaluate(
    model: Model,
    text: Annotated[
        str | None, typer.Option(help="self, c4, wikitext2 or a text file; wikitext2 unless --tasks.")
    ] = None,
    windows: Annotated[int, typer.Option(help="First windows of the text; 0 for all.")] = 40,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    tasks: Annotated[
        str | None, typer.Option(help="Zero-shot tasks by lm-eval's names, as arc_easy,piqa.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="First documents of each task; all if not given.")] = None,
    task_files: Annotated[
        str | None, typer.Option(help="Folder of task files, instead of the Hub's data.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="The original: adds KL and top-1 agreement.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of the forward pass: auto, float32, float16, bfloat16.")
    ] = "auto",
    json: Json = False,
) -> None:
    """Perplexity of MODEL, its accuracy on tasks and, against the original, how far it has moved from it."""
    from pbsp.commands.evaluate import run_evaluate

    run_evaluate(
        model,
        text=text,
        windows=windows,
        context=context,
        tasks=tasks,
        limit=limit,
        task_files=task_files,
        against=against,
        seed=seed,
        device=device,
        dtype=dtype,
        json=json,
    )


@app.command()
def compare(
    model: Model,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder of the comparison; the same one continues it.")
    ],
    methods: Annotated[
        str, typer.Option(help="Rows separated by commas, METHOD [N:M[+N:M]] [NAME=VALUE …], as gptq bits=2.")
    ],
    text: Annotated[list[str], typer.Option(help="self, c4, wikitext2 or a text file; repeatable.")],
    patterns: Annotated[
        str, typer.Option(help="Separated by commas: of rows that need a pattern and name none.")
    ] = "4:8",
    calibration: Calibration = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a calibration window.")] = None,
    windows: Annotated[int, typer.Option(help="First windows of each text; 0 for all.")] = 40,
    eval_context: Annotated[int, typer.Option(help="Tokens of an evaluation window.")] = 2048,
    seed: Annotated[int, typer.Option(help=_SEED_HELP)] = 0,
    device: Device = "auto",
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep the compressed models in the folder.")
    ] = False,
    json: Json = False,
) -> None:
    """Compress MODEL by several methods and evaluate each; stopped, the same command goes on."""
    from pbsp.commands.compare import EvaluationTexts, run_compare

    chosen = {"calibration": calibration, "samples": samples, "context": context, "seed": seed}
    run_compare(
        model,
        output,
        methods=methods,
        patterns=patterns,
        calibration={name: value for name, value in chosen.items() if value is not None},
        texts=EvaluationTexts(text, windows, eval_context, seed),
        device=device,
        keep_models=keep_models,
        json=json,
    )


@app.command()
def recover(
    folder: Annotated[str, typer.Argument(help="A folder written by `pbsp compress`.")],
    against: Annotated[str, typer.Option(help="The original that it was made from.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder to write; new or empty, see --overwrite.")
    ],
    calibration: Calibration = None,
    samples: Annotated[int | None, typer.Option(help="Windows; one in 16 is held out.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a window.")] = None,
    seed: TextSeed = None,
    epochs: Annotated[int, typer.Option(help="Passes over the windows.")] = 1,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Largest step of scales, relative, and of norms; by default less for nearer models."
        ),
    ] = None,
    code_rate: Annotated[
        float, typer.Option(help="Largest step towards another code, in scales; 0 leaves codes alone.")
    ] = 0.0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Tune a compressed model until its predictions are near the original's; it stays as small."""
    from pbsp.commands.recover import run_recover
    from pbsp.recovery.tunable import Tuning

    text = {"calibration": calibration, "samples": samples, "context": context, "seed": seed}
    run_recover(
        folder,
        output,
        against=against,
        text={name: value for name, value in text.items() if value is not None},
        tuning=Tuning(epochs, rate, code_rate),
        device=device,
        overwrite=overwrite,
        resume=resume,
        json=json,
    )


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(help="A folder written by `pbsp compress`.")], json: Json = False
) -> None:
    """What a compressed model stores, counted from its files."""
    from pbsp.commands.inspect import run_inspect

    run_inspect(folder, json=json)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to answer or continue.")],
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, no chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Answer a prompt."""
    from pbsp.commands.generate import run_generate

    run_generate(
        model,
        prompt,
        raw=raw,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        device=device,
        json=json,
    )


@app.command()
def bench(
    model: Model,
    against: Annotated[
        str | None, typer.Option(help="The original, timed in float32 and bfloat16 in the same run.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens written behind the first.")] = 64,
    runs: Annotated[int, typer.Option(help="Repetitions; medians are shown.")] = 3,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of MODEL: auto, float32, float16, bfloat16.")] = "auto",
    json: Json = False,
) -> None:
    """How fast MODEL reads a prompt and writes, its memory, and how near it comes to memory's speed."""
    from pbsp.commands.bench import run_bench

    run_bench(
        model,
        against=against,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        runs=runs,
        device=device,
        dtype=dtype,
        json=json,
    )
