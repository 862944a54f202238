"""``pelton bench compare``: results of ``pelton bench serve`` beside each other."""

from __future__ import annotations

from typing import Any

import click

from ..errors import PeltonError
from . import options


@click.command(short_help="Results of several servers in one report.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--label", "names", metavar="NAME,NAME", help="What the servers are called, in the order of the files.")
@click.option("--html", "html_file", type=click.Path(dir_okay=False), metavar="FILE", help="Write one page with all "
              "curves; nothing in it is loaded from elsewhere.")  # fmt: skip
def compare(files: tuple[str, ...], names: str | None, html_file: str | None) -> None:
    """Put results that pelton bench serve --json wrote beside each other, one line for each load.

    Results are comparable if they come from the same workload; where it differs, that is said.

    \b
    Examples:
      pelton bench serve --max-concurrency 1,4,16 --json a.json --label "Pelton"
      pelton bench serve --base-url http://127.0.0.1:8080 --max-concurrency 1,4,16 --json b.json --label "other"
      pelton bench compare a.json b.json --html both.html
    """
    from ..bench import serving_report
    from .bench_serve_output import print_runs
    from .roofs import console

    documents = [serving_report.read_document(file) for file in files]
    if names is not None:
        given = [name.strip() for name in names.split(",")]
        if len(given) != len(documents):
            raise PeltonError(f"--label names {len(given)} of {len(documents)} files", "give a name for each")
        documents = [{**document, "label": name} for document, name in zip(documents, given, strict=True)]
    write_html = options.writable(html_file)
    if html_file is not None:
        serving_report.check_plots()
    out = console()
    for name, document in zip(serving_report.labels(documents), documents, strict=True):
        for said in (*serving_report.problems(document), *document["notes"]):
            out.print(f"{name}: {said}", style="yellow", markup=False, soft_wrap=True)
    first, *others = map(_asked, documents)
    differing = sorted({key for asked in others for key in asked.keys() & first.keys() if asked[key] != first[key]})
    if differing:
        out.print(f"[red]the workloads differ in {', '.join(differing)}: this is no comparison[/red]")
    print_runs(out, documents)
    if html_file is not None:
        write_html(serving_report.page(documents))


def _asked(document: dict[str, Any]) -> dict[str, Any]:
    """What must be equal in a comparison; files of earlier versions have less of it."""
    target = {key: document["target"][key] for key in ("endpoint", "extra_body") if key in document["target"]}
    return {**document["workload"], **target, "slo": document.get("slo")}
