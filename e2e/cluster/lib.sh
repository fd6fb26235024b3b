# Processes, certificates, packages. Sourced.

say() { echo "cluster: $*" >&2; }
die() { say "$*"; exit 1; }
index() { case ${1:-} in [1-9]) ;; *) die "a node is 1 to 9" ;; esac; }

# package of every program that is used
declare -A packages=(
  [containerd]=containerd [runc]=runc [/usr/lib/cni/bridge]=containernetworking-plugins [iptables]=iptables [nft]=nftables
  [conntrack]=conntrack [ip]=iproute2 [ipset]=ipset [openssl]=openssl [curl]=curl [jq]=jq [mmdebstrap]=mmdebstrap
  [nsenter]=util-linux [unshare]=util-linux [flock]=util-linux [mount]=mount [pgrep]=procps [fuser]=psmisc
  [/etc/ssl/certs/ca-certificates.crt]=ca-certificates
)

deps() {
  local p missing=()
  for p in "${!packages[@]}"; do
    if [[ $p = /* ]]; then [ -e "$p" ] || missing+=("${packages[$p]}"); else command -v "$p" >/dev/null || missing+=("${packages[$p]}"); fi
  done
  [ ${#missing[@]} = 0 ] && return
  say "installing ${missing[*]}"
  # containerd and dnsmasq would be started at once; here they only run inside nodes.
  local log; log=$(mktemp)
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 ||
    { tail -5 "$log" >&2; die "install them by hand: apt-get install -y --no-install-recommends ${missing[*]}"; }
  rm -f "$log"
}

binaries() {
  local b want=("$@")
  [ $# -gt 0 ] || want=(etcd kube-apiserver kubectl kube-controller-manager kube-scheduler kubelet kube-proxy)
  for b in "${want[@]}"; do [ -x "$BIN/$b" ] || { say "building Kubernetes once, about 10 minutes"; "$here/bins/build.sh" "${want[@]}" >&2; break; }; done
  # Built each time: the go command knows whether anything changed.
  (cd "$here/.." && CGO_ENABLED=0 GOWORK=off go build -trimpath -buildvcs=false -o "$BIN/fabric" ./cluster/fabric) || die "cannot build the fabric"
}

# A pid alone may be another's after a reboot: a process is its pid and its start time.
started() { local s; { read -r s <"/proc/$1/stat"; } 2>/dev/null || return 0; set -- ${s##*) }; [ "$1" = Z ] || echo "${20}"; }
remember() { echo "$2 $(started "$2")" >"$1.pid"; }
alive() { # NAME: NAME.pid is that of a process that runs
  local pid at
  { read -r pid at <"$1.pid"; } 2>/dev/null || return 1
  [ -n "$at" ] && [ "$(started "$pid")" = "$at" ]
}
pid() { local pid at; read -r pid at <"$1.pid"; echo "$pid"; }
run() { # NAME COMMAND...: in the background, in a session and with an environment of its own
  local name=$1; shift
  env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
    setsid "$@" >>"$name.log" 2>&1 </dev/null &
  remember "$name" $!
  disown
}
stop() { # NAME: at once; nothing of its state is kept
  local i
  if alive "$1"; then
    kill -9 "$(pid "$1")"
    for i in $(seq 100); do alive "$1" || break; sleep 0.05; done
  fi
  rm -f "$1.pid"
}
until_ok() { # SECONDS WHAT COMMAND...
  local end=$((SECONDS + $1)) what=$2; shift 2
  until "$@"; do [ $SECONDS -lt $end ] || { say "$what: not in time"; return 1; }; sleep 0.1; done
}

# No packet for the endpoint may leave from the machine's own network namespace.
netns() { # NAME: its file, if it is one of ours and not the machine's
  local f=/run/netns/$1
  [ -e "$f" ] || die "there is no $1: $here/cluster.sh up"
  local id own
  id=$(stat -Lc %i "$f")
  for own in /proc/self/ns/net /proc/1/ns/net; do # the second cannot be read in every container
    [ "$id" != "$(stat -Lc %i $own 2>/dev/null)" ] || die "$f is the machine's own network namespace"
  done
  echo "$f"
}
in_cp() { local ns; ns=$(netns $CP); nsenter --net="$ns" -- "$@"; }
kubectl() { "$BIN/kubectl" --kubeconfig "$RUN/kubeconfig" "$@"; }

mkca() { # NAME CN [DIR]
  local d=${3:-$PKI}
  [ -s "$d/$1.crt" ] || openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -sha256 -days 3650 \
    -keyout "$d/$1.key" -out "$d/$1.crt" -subj "/CN=$2" -addext basicConstraints=critical,CA:TRUE \
    -addext keyUsage=critical,keyCertSign,cRLSign,digitalSignature 2>/dev/null
}
mkcert() { # NAME SUBJECT serverAuth|clientAuth [SANS [CA, without .crt]]
  local ca=${5:-$PKI/ca}
  [ -s "$PKI/$1.crt" ] && return
  openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -sha256 -keyout "$PKI/$1.key" -out "$PKI/$1.csr" -subj "$2" 2>/dev/null
  {
    echo "basicConstraints=CA:FALSE"; echo "keyUsage=critical,digitalSignature"; echo "extendedKeyUsage=$3"
    [ -z "${4:-}" ] || echo "subjectAltName=$4"
  } >"$PKI/$1.ext"
  openssl x509 -req -in "$PKI/$1.csr" -CA "$ca.crt" -CAkey "$ca.key" -set_serial "0x$(openssl rand -hex 8)" -days 3650 -sha256 \
    -extfile "$PKI/$1.ext" -out "$PKI/$1.crt" 2>/dev/null
  rm -f "$PKI/$1.csr" "$PKI/$1.ext"
}
mkkubeconfig() { # FILE NAME [SERVER]: for the client certificate NAME
  cat >"$1" <<K
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "${3:-$API}", certificate-authority-data: $(base64 -w0 "$PKI/ca.crt")}}]
users: [{name: u, user: {client-certificate-data: $(base64 -w0 "$PKI/$2.crt"), client-key-data: $(base64 -w0 "$PKI/$2.key")}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
K
  chmod 600 "$1"
}
