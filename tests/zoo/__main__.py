"""``python -m tests.zoo``: record every architecture, and write docs/reference/zoo.md. A second run goes on."""

import argparse
import json
import logging
import time
import warnings
from pathlib import Path

import torch

from tests.zoo.models import MODELS
from tests.zoo.page import write_page
from tests.zoo.record import record

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--only", nargs="*", help="these model types alone; the page is not written")
    parser.add_argument("--fresh", action="store_true", help="forget what former runs recorded")
    parser.add_argument("--records", type=Path, default=ROOT / "build" / "zoo", help="where the records are kept")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    options.records.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        path = options.records / f"{model.model_type}.json"
        if options.only and model.model_type not in options.only:
            continue
        if path.exists() and not options.fresh and not options.only:
            continue
        started = time.monotonic()
        torch.manual_seed(0)
        rows = record(model, lambda step: print(step, flush=True))
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        for row in rows:
            print(f"  {row}"[:400], flush=True)
        print(f"  {time.monotonic() - started:.0f} s", flush=True)
    if not options.only:
        print(f"wrote {write_page(options.records, ROOT / 'docs' / 'reference' / 'zoo.md')}")


if __name__ == "__main__":
    main()
