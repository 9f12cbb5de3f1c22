"""A page that shows a run, or compares several: ``python scripts/report.py RUN ...``; ``--help`` says more."""

from nemo_aapo.cli.view.report import main

if __name__ == "__main__":
    raise SystemExit(main())
