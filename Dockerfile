# imdsgate for amd64 and arm64, with both back ends of iptables:
#
#     docker buildx build --platform linux/amd64,linux/arm64 -t REGISTRY/imdsgate:0.1.0 --push .
#
# No stage runs anything of another architecture than the builder's: neither QEMU nor a second builder is needed.
# e2e/deploy/build-image.sh builds this file from local bases.
ARG GO=golang:1.26
# Any Debian.
ARG BASE=debian:bookworm-slim

FROM --platform=$BUILDPLATFORM ${GO} AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG TARGETARCH
RUN CGO_ENABLED=0 GOARCH=$TARGETARCH go build -trimpath -ldflags="-s -w" -o /out/ ./cmd/...

# Debian's packages of the image's architecture. Nothing of them runs, so that any machine builds any of them. apt is told that
# nothing is installed and fetches every dependency. Not when a mount has them.
FROM --platform=$BUILDPLATFORM ${BASE} AS debian
ARG TARGETARCH
RUN [ -e /debs/ca-certificates_*.deb ] || { mkdir -p /debs/partial && cd /debs && : >/none && \
      echo "APT::Architecture $TARGETARCH; APT::Architectures $TARGETARCH; Dir::State::status /none; Dir::Cache::archives /debs;" >/apt.conf && export APT_CONFIG=/apt.conf && \
      apt-get update && apt-get install -y --no-install-recommends --download-only iptables && apt-get download ca-certificates; }

# Both back ends of iptables under their own names, by which a cleanup and -check find the one that is not in use, with their
# extensions and libraries; CA certificates; no shell. Licences must go with what is copied, and scanners find packages by their
# control files.
FROM debian AS rootfs
RUN set -eu; mkdir -p /rootfs/usr/lib /rootfs/usr/lib64 /rootfs/etc/ssl/certs /rootfs/var/lib/dpkg/status.d; cd /rootfs; ln -s usr/lib usr/lib64 .; \
    for deb in /debs/*.deb; do \
      dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink; \
      dpkg-deb --field "$deb" >"var/lib/dpkg/status.d/$(dpkg-deb --field "$deb" Package)"; \
    done; \
    cat usr/share/ca-certificates/mozilla/*.crt >etc/ssl/certs/ca-certificates.crt; \
    rm -r usr/bin usr/lib/*/gconv; find usr/sbin -mindepth 1 ! -name 'xtables-*-multi' ! -name 'ip*tables-nft*' ! -name 'ip*tables-legacy*' -delete; \
    find usr/share -type f ! -path '*/doc/*/copyright' -delete; find usr/share -xtype l -delete; find usr/share -type d -empty -delete; \
    cp -r /usr/share/common-licenses usr/share; cp /usr/lib/os-release usr/lib; ln -s ../usr/lib/os-release etc
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
COPY --from=build /src/LICENSE /src/THIRD_PARTY_LICENSES /usr/share/doc/imdsgate/
# imdsgate-load is for pods: whoever runs the image on its nodes can measure with it.
COPY --from=build /out/ /
ENV PATH=/iptables/nft:/usr/sbin:/usr/bin:/sbin:/bin
# Root alone may use iptables; the chart takes every capability but NET_ADMIN away.
USER 0:0
ENTRYPOINT ["/imdsgate"]
