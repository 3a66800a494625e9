"""``python -m sharding.simcity RAW`` renders cities into a folder."""

from sharding.simcity.city import main

if __name__ == "__main__":
    main()
