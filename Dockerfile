# imdsgate for amd64 and arm64, with both back ends of iptables:
#
#     docker buildx build --platform linux/amd64,linux/arm64 -t REGISTRY/imdsgate:0.1.0 --push .
#
# Go compiles for the other architecture by itself; the Debian stages run in it (QEMU, or a builder of it).
# e2e/deploy/build-image.sh builds this file from local bases.
ARG GO=golang:1.26
# Any Debian or derivative. What it brings already is not installed.
ARG BASE=debian:bookworm-slim

FROM --platform=$BUILDPLATFORM ${GO} AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG TARGETARCH
RUN CGO_ENABLED=0 GOARCH=$TARGETARCH go build -trimpath -ldflags="-s -w" -o /imdsgate ./cmd/imdsgate

FROM ${BASE} AS debian
RUN [ -e /usr/sbin/xtables-nft-multi ] && [ -e /etc/ssl/certs/ca-certificates.crt ] || \
    { apt-get update && apt-get install -y --no-install-recommends iptables ca-certificates && rm -rf /var/lib/apt/lists/*; }

# Both back ends, their extensions, what the loader resolves for these, itself included; CA certificates. No shell.
FROM debian AS rootfs
RUN set -eu; mkdir /rootfs; \
    set -- /usr/sbin/xtables-nft-multi /usr/sbin/xtables-legacy-multi /usr/lib/*/xtables/*.so; \
    ldd "$@" >/ldd; if grep 'not found' /ldd; then exit 1; fi; \
    cp --parents -L "$@" $(grep -o '/[^ :]*\.so[^ :]* (0x' /ldd | cut -d' ' -f1 | sort -u) /etc/ssl/certs/ca-certificates.crt /rootfs
# Links of our own to the back ends: a wrapper that finds one by looking at the node's rules cannot keep its choice on a read-only
# root file system. PATH decides: nft, or legacy (value iptables of the chart).
RUN set -eu; for mode in nft legacy; do \
      mkdir -p /rootfs/iptables/$mode; \
      for name in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do \
        ln -s /usr/sbin/xtables-$mode-multi /rootfs/iptables/$mode/$name; \
      done; \
    done

FROM scratch
COPY --from=rootfs /rootfs/ /
COPY --from=build /imdsgate /imdsgate
ENV PATH=/iptables/nft:/usr/sbin:/usr/bin:/sbin:/bin
# Root alone may use iptables; the chart takes every capability but NET_ADMIN away.
USER 0:0
ENTRYPOINT ["/imdsgate"]
