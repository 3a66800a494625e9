"""``python -m geostream`` is the command ``geostream``; so ``torchrun -m geostream train …`` starts one on each GPU."""

from geostream.cli.main import main

if __name__ == "__main__":
    main()
