"""``python -m prism_sgl.launch --config models.toml [--check]``"""

from __future__ import annotations

import argparse
import sys

from prism_sgl import config
from prism_sgl.errors import EXIT_OK, PrismError
from prism_sgl.launch.banner import base_url
from prism_sgl.launch.cards import check_cards
from prism_sgl.launch.nvml import ReadCards, read_cards


def main(arguments: list[str] | None = None, *, read_cards: ReadCards = read_cards) -> int:
    parser = argparse.ArgumentParser(
        prog="prism_sgl.launch", description="Serve the models of a models.toml."
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the models.toml")
    parser.add_argument("--check", action="store_true", help="only say whether the file is right")
    given = parser.parse_args(arguments)
    try:
        loaded = config.load(given.config)
        if given.check:
            for note in check_cards(loaded, config.cuda_environment(), read_cards, is_here=False):
                print(f"note: {note}")
            print(f"{given.config} is right: {', '.join(loaded.models)} at {base_url(loaded)}")
            return EXIT_OK
        from prism_sgl.launch import supervisor  # ZeroMQ and the ledger: not needed to check a file

        return supervisor.run(loaded, read_cards=read_cards)
    except PrismError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
