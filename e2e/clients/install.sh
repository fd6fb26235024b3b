#!/usr/bin/env bash
# install.sh: installs what the client tests run: Debian's AWS clients and network tools, and the
# npm clients in the versions of programs/js/package-lock.json. Idempotent; under a second when
# everything is there.
set -euo pipefail
cd "$(dirname "$0")"

packages=(awscli python3-boto3 python3-awscrt python3-boto ruby-aws-sdk-core
  iptables nftables conntrack iproute2 openssl jq)
# The race detector needs a C compiler.
command -v gcc >/dev/null || packages+=(gcc libc6-dev)
command -v node >/dev/null || packages+=(nodejs)
command -v npm >/dev/null || packages+=(npm)

missing=()
for p in "${packages[@]}"; do
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
done
if [ ${#missing[@]} -gt 0 ]; then
  echo "clients: installing ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi

# npm ci empties node_modules first, so an interrupted run leaves no stamp and is done again.
cd programs/js
lock=$(sha256sum package-lock.json)
if [ "$(cat node_modules/.installed 2>/dev/null)" != "$lock" ]; then
  echo "clients: installing the npm clients"
  npm ci --loglevel=error
  echo "$lock" >node_modules/.installed
fi
