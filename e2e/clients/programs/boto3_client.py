"""Debian's python3-boto3. A fetch is what a program without configuration does: a new session's
default chain. boto3 keeps no metadata token, so a second session asks exactly what a refresh asks."""

import boto3
from botocore.exceptions import NoCredentialsError

from contract import run


def fetch():
    credentials = boto3.session.Session().get_credentials()
    if credentials is None:
        raise NoCredentialsError()
    return credentials.get_frozen_credentials().access_key, credentials._expiry_time.isoformat()


run("boto3", fetch)
