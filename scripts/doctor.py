"""Looks at a machine or an allocation before it burns hours: ``python scripts/doctor.py [OPTIONS] [KEY=VALUE ...]``."""

from nemo_aapo.cli.doctor import main

if __name__ == "__main__":
    raise SystemExit(main())
