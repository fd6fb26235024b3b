"""Debian's python3-awscrt 0.16.8 (aws-c-auth of early 2023): requests without Host, no session
token beyond 64 characters, no first-byte timeout, and a fatal assertion on a document it cannot use.
The default chain caches for 15 minutes and cannot be told to refresh from Python, so a fetch is a
new chain."""

from awscrt.auth import AwsCredentialsProvider
from awscrt.io import ClientBootstrap, DefaultHostResolver, EventLoopGroup

from contract import run

group = EventLoopGroup(1)
bootstrap = ClientBootstrap(group, DefaultHostResolver(group))


def fetch():
    credentials = AwsCredentialsProvider.new_default_chain(bootstrap).get_credentials().result()
    return credentials.access_key_id, ""


run("crt", fetch)
