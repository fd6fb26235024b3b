#!/usr/bin/env bash
# install.sh: installs the browser that the status page is tested in. Idempotent.
set -euo pipefail

missing=()
for p in chromium fonts-dejavu-core; do
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
done
if [ ${#missing[@]} -gt 0 ]; then
  echo "page: installing ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi
