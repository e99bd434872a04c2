"""Command line. Each command is one function elsewhere; nothing heavy is imported before it."""

from __future__ import annotations

import argparse
import errno
import io
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from spmdrl.commands.config_commands import add_config, add_config_commands, load
from spmdrl.commands.doctor_command import add_doctor
from spmdrl.commands.launch import COMMANDS
from spmdrl.commands.run_commands import add_run_commands
from spmdrl.commands.verify_model import add_verify_model
from spmdrl.config.user_objects import AgreedError
from spmdrl.supervision.error_file import launcher_shows_errors, write_error_file
from spmdrl.supervision.signals import EXIT_INTERRUPTED, Signals, release

if TYPE_CHECKING:
    from spmdrl.config.sections import Config
    from spmdrl.world import World

HEARS_SIGNALS = (*COMMANDS, "launch")
"""Commands that answer SIGINT and SIGTERM themselves."""


FIRST_S = 1.0
"""Seconds that other ranks wait for rank 0's message: launchers end all ranks after the first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, 2 after bad input (one clear message on stderr), 1 after an error
    that `spmdrl launch` shows, or 130 after Ctrl-C.
    """
    _prepare_streams()
    options = parse(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    if options.name not in HEARS_SIGNALS:
        release()
    try:
        command(options)
    except (ValueError, OSError, MemoryError) as error:
        if options.traceback:
            raise
        # printed in one write: ranks share a stream
        line = f"spmdrl {options.name}: error: {_text_of(error)}"
        if launcher_shows_errors():
            write_error_file(error, line, code=2)
        elif isinstance(error, AgreedError) and os.environ.get("RANK", "0") != "0":
            time.sleep(FIRST_S)
        else:
            print(line, file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        if options.name in HEARS_SIGNALS:  # a debugger's
            raise
        print(f"spmdrl {options.name}: interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except Exception as error:
        # `spmdrl launch` shows the first rank's, if every rank has one
        if not launcher_shows_errors():
            raise
        from spmdrl.supervision.failures import is_lost_peer

        write_error_file(error, lost=is_lost_peer(error))
        return 1
    return 0


def _text_of(error: ValueError | OSError | MemoryError) -> str:
    text = str(error)
    if isinstance(error, UnicodeEncodeError) and not _has_utf8_names():
        return f"{error.object!r} cannot be a file's name here: {_UTF8_NEEDED}"
    causes = list(_chain(error))
    if any(_lacks_files(each) for each in causes):
        return f"{text}: raise ulimit -n, which is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"
    if any(isinstance(each, MemoryError) for each in causes):
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if isinstance(error, MemoryError):
            text = f"no memory is left {text}".rstrip()
        if limit != resource.RLIM_INFINITY:
            text += f": raise ulimit -v, which is {limit // 1024}"
    return text


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes: one may be told as another, a module's import by its key."""
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__


def _lacks_files(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def _has_utf8_names() -> bool:
    return sys.getfilesystemencoding().lower() in ("utf-8", "utf8")


_UTF8_NEEDED = (
    f"the locale's encoding of file names is {sys.getfilesystemencoding()}, and other letters than "
    "ASCII's need UTF-8: set PYTHONUTF8=1 (or LC_ALL=C.UTF-8)"
)


def _prepare_streams() -> None:
    """Prevent errors from characters that the encoding of a terminal or log lacks, and from closed
    standard streams, whose file descriptors the next files would get.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  to the end of the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not _has_utf8_names() and os.environ.get("RANK", "0") == "0":
        print(f"spmdrl: {_UTF8_NEEDED}", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the words of a command line; `key=value` may come before and after options."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    root = parser()
    if words[:1] == ["launch"] or words[:2] == ["--traceback", "launch"]:
        # its words are those of torchrun and of another command
        number = words.index("launch") + 1
        options = root.parse_args(words[:number])
        options.words = words[number:]
        return options
    options, rest = root.parse_known_args(words)
    strange = [word for word in rest if word.startswith("-") or "=" not in word]
    if strange or (rest and "overrides" not in vars(options)):
        root.error(f"unrecognized arguments: {' '.join(strange or rest)}")
    if rest:
        options.overrides += rest
    return options


def parser() -> argparse.ArgumentParser:
    """Parser of the commands and their words."""
    root = argparse.ArgumentParser(
        prog="spmdrl", description="RL post-training as one SPMD program. Start ranks by torchrun."
    )
    root.add_argument("--traceback", action="store_true", help="show where bad input was found")
    commands = root.add_subparsers(dest="name", required=True)

    def add(
        name: str, function: Callable[[argparse.Namespace], None], text: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        return command

    add("launch", _launch, LAUNCH_TEXT)
    for name, function, text in (
        ("train", _train, "Run the configuration's flow on all ranks."),
        ("eval", _eval, "Evaluate model.path on the held-out sets of prompts."),
    ):
        add_config(add(name, function, text))
    add_config_commands(add)
    generate = add("generate", _generate, "Generate responses to prompts: JSONL in, JSONL out.")
    generate.add_argument("--prompts", required=True, help="JSONL with data.train.prompt_column")
    generate.add_argument("--out", required=True, help="JSONL to write")
    add_config(generate)
    add_run_commands(add)
    _add_convert_words(
        add("convert", _convert, "GGUF, Megatron or Hugging Face model -> Hugging Face directory.")
    )
    check = add(
        "check-model",
        _check_model,
        "Compare what a Hugging Face directory says with what it holds; 2 if it is refused.",
    )
    check.add_argument("directory", help="a model, or a PEFT adapter")
    check.add_argument(
        "--base", metavar="MODEL", help="the adapter's base, if it is not where the adapter says"
    )
    add_verify_model(add)
    add_doctor(add)
    return root


def _add_convert_words(convert: argparse.ArgumentParser) -> None:
    convert.add_argument("source")
    convert.add_argument("out_dir")
    convert.add_argument(
        "--pad-heads-to",
        metavar="QUERY/KV",
        help="of a Hugging Face directory: add heads of zeros, so that tp divides them",
    )
    convert.add_argument(
        "--like",
        metavar="MODEL",
        help="of a Megatron checkpoint (torch_dist): the Hugging Face directory whose config.json "
        "and tokenizer it has; the checkpoint's index is a pickle, so convert only what you trust",
    )
    convert.add_argument(
        "--merge",
        metavar="ADAPTER",
        help="of a Hugging Face directory: add this PEFT adapter to its matrices",
    )
    convert.add_argument(
        "--dtype", help="of a merge: dtype of the files (default: that of each tensor)"
    )


LAUNCH_TEXT = (
    f"[torchrun's options] {'|'.join(COMMANDS)} ...: run a command on the ranks of this node."
)


@contextmanager
def _world(config: Config) -> Iterator[World]:
    """Join the world; leave it only if there was no error, after which others may not answer."""
    from spmdrl.commands.hardware import say_world_hardware
    from spmdrl.commands.start_environment import set_start_environment
    from spmdrl.observe.log import set_up_logging
    from spmdrl.supervision.failures import end_process_in
    from spmdrl.world import start_world, stop_world

    set_start_environment()
    world = start_world(
        timeout_s=config.timeout_s,
        device=config.device,
        # vLLM's sleeping allocator has no use of them (pytorch issue 147851)
        expandable_segments=config.rollout.engine != "vllm",
    )
    set_up_logging(world.rank)
    say_world_hardware(world, config.device)
    try:
        yield world
    except BaseException:
        end_process_in(15, code=1)
        raise
    stop_world()


@contextmanager
def _signals(options: argparse.Namespace, *, saves: bool = True) -> Iterator[Signals]:
    """Answer signals from here on; after an end without error they are ignored."""
    signals = Signals(options.name, saves=saves)
    try:
        yield signals
        signals.ignore()
    finally:
        signals.close()


def _launch(options: argparse.Namespace) -> None:
    from spmdrl.commands.launch import launch

    def check(words: Sequence[str]) -> None:
        """Find a user's mistake here, before every rank finds it."""
        ranks_options = parse(words)
        if "config" in vars(ranks_options):
            load(ranks_options)

    before = ["--traceback"] if options.traceback else []
    code = launch(options.words, before, check)
    if code:
        raise SystemExit(code)


def _train(options: argparse.Namespace) -> None:
    # before torch is imported: a warning may come meanwhile, and reward workers are forked from a
    # clean process
    from spmdrl.rewards.server import start_reward_server

    with _signals(options) as signals, start_reward_server() as server:
        config = load(options)  # before torch is imported: a mistake is reported at once
        from spmdrl.commands.train import train

        with _world(config) as world:
            train(config, world, server, signals)


def _eval(options: argparse.Namespace) -> None:
    from spmdrl.rewards.server import start_reward_server

    with _signals(options, saves=False), start_reward_server() as server:
        config = load(options)
        from spmdrl.atomic_files import finite_json
        from spmdrl.commands.evaluate import evaluate

        with _world(config) as world:
            metrics = evaluate(config, world, server)
            if world.is_first:
                print(finite_json({"model": config.model.path, **metrics}), flush=True)


def _generate(options: argparse.Namespace) -> None:
    with _signals(options, saves=False):
        config = load(options)
        from spmdrl.commands.evaluate import generate

        with _world(config) as world:
            count = generate(config, world, options.prompts, options.out)
            if world.is_first:
                print(f"{count} responses in {options.out}", flush=True)


def _check_model(options: argparse.Namespace) -> None:
    from spmdrl.models.files.check import check_directory
    from spmdrl.models.files.hub import local_directory

    found = check_directory(local_directory(options.directory), options.base)
    print("\n".join(found.lines), flush=True)
    if found.errors:
        raise SystemExit(2)


def _convert(options: argparse.Namespace) -> None:
    from spmdrl.models.files.gguf import convert_gguf
    from spmdrl.models.files.gguf_packages import find_packaged_gguf
    from spmdrl.models.files.torch_dist import convert_torch_dist, is_torch_dist

    if options.dtype is not None and options.merge is None:
        raise ValueError(f"--dtype {options.dtype} is of no use without --merge")
    if options.merge is not None:
        if options.pad_heads_to is not None or options.like is not None:
            raise ValueError("--merge stands alone: convert once more for the other change")
        from spmdrl.models.files.merge import merge_adapter

        report = merge_adapter(options.source, options.merge, options.out_dir, options.dtype)
        print("\n".join(report.lines), file=sys.stderr)
    elif options.pad_heads_to is not None:
        from spmdrl.models.files.pad_heads import pad_heads

        pad_heads(options.source, options.out_dir, options.pad_heads_to)
    elif is_torch_dist(options.source):
        if options.like is None:
            raise ValueError(
                f"{options.source} is a Megatron checkpoint, which has no config.json and no "
                "tokenizer: give a Hugging Face directory that has them with --like"
            )
        convert_torch_dist(options.source, options.like, options.out_dir)
    elif Path(options.source, "config.json").is_file():
        from spmdrl.models.files.pickles import convert_pickles, has_pickles

        if not has_pickles(options.source):
            raise ValueError(
                f"{options.source} is a Hugging Face directory already; of one, convert only adds "
                "heads, merges an adapter or reads pytorch_model.bin: give --pad-heads-to or "
                "--merge"
            )
        convert_pickles(options.source, options.out_dir)
    else:
        convert_gguf(find_packaged_gguf(options.source), options.out_dir)
    print(options.out_dir)
