#!/usr/bin/env bash
# Builds the Dockerfile without a registry and without a daemon, and prints the path of the docker-archive:
#
#     e2e/deploy/build-image.sh          # ~/.cache/imdsgate-e2e/images/imdsgate.tar, test.local/imdsgate:dev
#     e2e/deploy/build-image.sh arm64    # ~/.cache/imdsgate-e2e/images/imdsgate-arm64.tar
#
# Its bases are made here: for the build stage busybox with this machine's Go, module cache and build cache; for the other one Debian
# by mmdebstrap. That and the packages are kept for the next build. Nothing happens while nothing has changed. Needs root;
# installs what is missing.
set -euo pipefail
umask 022

top=$(cd "$(dirname "$0")/../.." && pwd)
images=${XDG_CACHE_HOME:-$HOME/.cache}/imdsgate-e2e/images
native=$(go env GOHOSTARCH)
arch=${1:-$native}
out=$images/imdsgate.tar
[[ $arch == "$native" ]] || out=$images/imdsgate-$arch.tar
tag=test.local/imdsgate:dev
mkdir -p "$images"
exec 9>"$images/lock"
flock 9

# The binary's sources, whether committed or not, and all that makes the image of them.
stamp=$(cd "$top" && {
  go version
  cat e2e/deploy/build-image.sh Dockerfile .dockerignore LICENSE THIRD_PARTY_LICENSES go.mod go.sum
  find cmd cache proxy iptables -name '*.go' ! -name '*_test.go' -print0 | sort -z | xargs -0 sha256sum
} | sha256sum | cut -d' ' -f1)
if [[ -s $out && $(cat "$out.stamp" 2>/dev/null) == "$stamp" ]]; then
  echo "$out"
  exit
fi

missing=()
for need in buildah:buildah mmdebstrap:mmdebstrap busybox:busybox-static; do
  command -v "${need%%:*}" >/dev/null || missing+=("${need##*:}")
done
if ((${#missing[@]})); then
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >&2
fi

work=$(mktemp -d)
storage=(--storage-driver vfs --root "$work/storage" --runroot "$work/run")
trap 'rm -rf "$work"' EXIT

mkdir "$work/go"
cp "$(command -v busybox)" "$work/go/busybox"
cat >"$work/go.dockerfile" <<'F'
FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "mkdir", "/tmp"]
RUN ["/bin/busybox", "--install", "/bin"]
ENV PATH=/usr/local/go/bin:/bin GOPATH=/go GOCACHE=/go/cache GOTOOLCHAIN=local
F

bud() { buildah "${storage[@]}" bud --isolation chroot --pull-never --layers=false --quiet "$@" >&2; }

# Debian is kept, and its packages for as long as the Dockerfile is the same.
suite=$(. /etc/os-release; echo "$VERSION_CODENAME")
base=$images/base-$suite.tar
debs=$images/debs-$suite-$arch-$(sha256sum <"$top/Dockerfile" | cut -c1-16)
if [[ ! -s $base ]]; then
  rm -f "$images"/base-*.tar
  mmdebstrap --quiet --variant=apt --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --customize-hook='rm -rf "$1"/var/lib/apt/lists/*' "$suite" "$images/.base.tar" >&2
  mv "$images/.base.tar" "$base"
fi
[[ -d $debs ]] || { rm -rf "$images/debs-$suite-$arch-"*; mkdir "$debs"; }
printf 'FROM scratch\nADD %s /\n' "${base##*/}" >"$work/debian.dockerfile"
bud -t localhost/debian -f "$work/debian.dockerfile" "$images"

bud -t localhost/go -f "$work/go.dockerfile" "$work/go"
mkdir -p "$(go env GOMODCACHE)" "$(go env GOCACHE)"
bud -t "$tag" --platform "linux/$arch" --build-arg "BUILDPLATFORM=linux/$native" --build-arg GO=localhost/go --build-arg BASE=localhost/debian --build-arg "TARGETARCH=$arch" \
  -v "$(go env GOROOT):/usr/local/go:ro" -v "$(go env GOMODCACHE):/go/pkg/mod" -v "$(go env GOCACHE):/go/cache" -v "$debs:/debs" \
  --env "GOPROXY=$(go env GOPROXY)" --unsetenv GOPROXY -f "$top/Dockerfile" "$top"
rm -f "$out.new"
buildah "${storage[@]}" push --quiet "$tag" "docker-archive:$out.new:$tag" >&2
mv "$out.new" "$out"
echo "$stamp" >"$out.stamp"
echo "$out"
