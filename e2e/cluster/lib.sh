# Processes, certificates, packages. Sourced.

say() { echo "cluster: $*" >&2; }
die() { say "$*"; exit 1; }
index() { case ${1:-} in [1-9]) ;; *) die "a node is 1 to 9" ;; esac; }

# package of every program that is used
declare -A packages=(
  [containerd]=containerd [runc]=runc [/usr/lib/cni/bridge]=containernetworking-plugins [iptables]=iptables [nft]=nftables
  [conntrack]=conntrack [ip]=iproute2 [openssl]=openssl [curl]=curl [jq]=jq [mmdebstrap]=mmdebstrap
  [nsenter]=util-linux [unshare]=util-linux [flock]=util-linux [mount]=mount [pgrep]=procps
  [/etc/ssl/certs/ca-certificates.crt]=ca-certificates
)

deps() {
  local p missing=()
  for p in "${!packages[@]}"; do
    if [[ $p = /* ]]; then [ -e "$p" ] || missing+=("${packages[$p]}"); else command -v "$p" >/dev/null || missing+=("${packages[$p]}"); fi
  done
  [ ${#missing[@]} = 0 ] && return
  say "installing ${missing[*]}"
  # containerd would be started at once; here it only runs inside nodes.
  local log; log=$(mktemp)
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 ||
    { tail -5 "$log" >&2; die "install them by hand: apt-get install -y --no-install-recommends ${missing[*]}"; }
  rm -f "$log"
}

binaries() {
  local b want=("$@")
  [ $# -gt 0 ] || want=(etcd kube-apiserver kubectl kube-controller-manager kube-scheduler kubelet kube-proxy coredns)
  for b in "${want[@]}"; do [ -x "$BIN/$b" ] || { say "building Kubernetes once, about 12 minutes"; "$here/bins/build.sh" "${want[@]}" >&2; break; }; done
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

# Valid from yesterday on, as the clock of a node may be behind: openssl req and x509 cannot do that before version 3.4.
sign() { # FILE, without .csr and .crt, EXTENSIONS ARGS...
  local f=$1 ext=$2 d=$1.tmp; shift 2
  rm -rf "$d"; mkdir "$d"; : >"$d/index"
  printf '%s\n' "$ext" >"$d/ext"
  printf '%s\n' '[ca]' default_ca=d '[d]' "database=$d/index" "new_certs_dir=$d" "serial=$d/serial" policy=p '[p]' organizationName=optional commonName=supplied >"$d/config"
  openssl ca -batch -notext -md sha256 -rand_serial -preserveDN -startdate "$(date -u -d yesterday +%Y%m%d%H%M%SZ)" -days 3650 -config "$d/config" \
    -in "$f.csr" -out "$f.crt" -extfile "$d/ext" "$@" 2>/dev/null
  rm -rf "$d" "$f.csr"
}
request() { # FILE SUBJECT
  openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -sha256 -keyout "$1.key" -out "$1.csr" -subj "$2" 2>/dev/null
}
mkca() { # NAME CN [DIR]
  local f=${3:-$PKI}/$1
  [ ! -s "$f.crt" ] || return 0
  request "$f" "/CN=$2"
  sign "$f" $'basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign,digitalSignature\nsubjectKeyIdentifier=hash' -selfsign -keyfile "$f.key"
}
mkcert() { # NAME SUBJECT serverAuth|clientAuth [SANS [CA, without .crt]]
  local f=$PKI/$1 ca=${5:-$PKI/ca} ext=$'basicConstraints=CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage='$3
  [ ! -s "$f.crt" ] || return 0
  [ -z "${4:-}" ] || ext+=$'\nsubjectAltName='$4
  request "$f" "$2"
  sign "$f" "$ext" -cert "$ca.crt" -keyfile "$ca.key"
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
