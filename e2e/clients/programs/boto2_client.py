"""Debian's python3-boto 2: IMDSv1 only, and None where there is no role."""

from boto.provider import Provider

from contract import run


class NoCredentials(Exception):
    pass


def fetch():
    provider = Provider("aws")
    if provider.access_key is None:
        raise NoCredentials("boto found no credentials")
    return provider.access_key, provider._credential_expiry_time


run("boto2", fetch)
