# imdsgate for amd64 and arm64, with both back ends of iptables:
#
#     docker buildx build --platform linux/amd64,linux/arm64 -t REGISTRY/imdsgate:0.1.0 --push .
#
# Both tags stand in public documents; nobody here could pull them. e2e/deploy/build-image.sh builds this file from local bases.
ARG GO=golang:1.26
# Brings /usr/sbin/xtables-nft-multi, /usr/sbin/xtables-legacy-multi and CA certificates.
ARG BASE=build-image/distroless-iptables:v0.9.1

FROM --platform=$BUILDPLATFORM ${GO} AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG TARGETARCH
# Links of our own to the back ends: a wrapper that finds one by looking at the node's rules cannot keep its choice on a read-only
# root file system. PATH decides: nft, or legacy (value iptables of the chart).
RUN CGO_ENABLED=0 GOARCH=$TARGETARCH go build -trimpath -ldflags="-s -w" -o /out/imdsgate ./cmd/imdsgate && \
    for mode in nft legacy; do \
      mkdir -p /out/iptables/$mode && \
      for name in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do \
        ln -s /usr/sbin/xtables-$mode-multi /out/iptables/$mode/$name || exit 1; \
      done; \
    done

FROM ${BASE}
COPY --from=build /out/ /
ENV PATH=/iptables/nft:/usr/sbin:/usr/bin:/sbin:/bin
# Root alone may use iptables; the chart takes every capability but NET_ADMIN away.
USER 0:0
ENTRYPOINT ["/imdsgate"]
