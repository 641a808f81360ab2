"""`python -m quasar_cli`: the command line of a checkout that is not installed."""

from quasar_cli.main import main

if __name__ == "__main__":
    main()
