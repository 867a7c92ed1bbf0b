"""`python -m llmsys.figures <paper>`: a paper's figures as files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llmsys.figures import drawing
from llmsys.figures.catalogue import PAPERS


def _listed() -> str:
    width = max(len(name) for figures in PAPERS.values() for name in figures)
    lines = ["figures, and the question that each answers:"]
    for paper, figures in PAPERS.items():
        lines += ["", f"  {paper}"]
        lines += [f"    {name:{width}}  {entry.question}" for name, entry in figures.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Prints the path of each file; what cannot be drawn is named on standard error. 1 where nothing was drawn."""
    parser = argparse.ArgumentParser(
        prog="python -m llmsys.figures",
        description="The figures of a paper from records, as files.",
        epilog=_listed(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paper", metavar="PAPER", nargs="?", help=" | ".join(PAPERS))
    parser.add_argument("figure", metavar="FIGURE", nargs="*", help="only these; without any all of the paper")
    parser.add_argument("--records", metavar="FOLDER", help="results, say (default: the published records)")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=Path("figures"), help="default: %(default)s")
    parser.add_argument("--format", choices=drawing.FORMATS, default="pdf", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.paper is None:
        parser.error(f"PAPER: missing; one of {', '.join(PAPERS)}, or --help for their figures")
    drawn = 0
    try:
        names = [*dict.fromkeys(arguments.figure)] or list(drawing.entries(arguments.paper))
        for name in names:
            drawing.entry(arguments.paper, name)
        records = drawing.read(arguments.paper, arguments.records)
        for name in names:
            try:
                figure = drawing.draw(arguments.paper, name, records)
            except ValueError as error:
                print(f"llmsys.figures: {name} is left out: {error}", file=sys.stderr)
                continue
            print(drawing.save(figure, arguments.out / f"{arguments.paper}_{name}.{arguments.format}"))
            drawn += 1
    except (ValueError, OSError) as error:
        print(f"llmsys.figures: {error}", file=sys.stderr)
        return 1
    return 0 if drawn else 1


if __name__ == "__main__":
    sys.exit(main())
