"""A rollout server: ``python scripts/serve.py KEY=VALUE ...``, with the settings of the run that it serves."""

from nemo_aapo.cli.serve import main

if __name__ == "__main__":
    raise SystemExit(main())
