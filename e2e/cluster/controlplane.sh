# etcd, kube-apiserver, kube-controller-manager, kube-scheduler and the fabric. Sourced.

cp_network() {
  [ -e /run/netns/$CP ] && return
  ip netns add $CP
  ip -n $CP link set lo up
  ip -n $CP link add br0 address 02:00:1d:00:00:01 type bridge mcast_snooping 0
  in_cp sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.br0.accept_dad=0
  local a
  for a in 172.30.0.1/24 172.30.0.2/24 169.254.169.254/32 fd00:30::1/64 fd00:ec2::254/128; do ip -n $CP addr add $a dev br0; done
  ip -n $CP link set br0 up
}

pki() {
  mkdir -p "$PKI"; chmod 700 "$RUN" "$DATA"
  mkca ca kubernetes-ca; mkca front-proxy-ca front-proxy-ca
  mkcert front-proxy-client /CN=front-proxy-client clientAuth "" "$PKI/front-proxy-ca"
  mkcert apiserver /CN=kube-apiserver serverAuth "IP:127.0.0.1,IP:172.30.0.1,IP:10.96.0.1,DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local"
  mkcert apiserver-kubelet-client /O=system:masters/CN=kube-apiserver-kubelet-client clientAuth
  mkcert aws /CN=aws serverAuth "DNS:sts.us-east-1.amazonaws.com,DNS:sts.amazonaws.com,DNS:s3.us-east-1.amazonaws.com,DNS:s3.amazonaws.com,DNS:iam.amazonaws.com,IP:172.30.0.2" "$CACHE/images/aws-ca"
  # RSA, as in every real cluster: AWS takes RS256 only.
  [ -s "$PKI/sa.key" ] || { openssl genrsa -out "$PKI/sa.key" 2048 2>/dev/null; openssl rsa -in "$PKI/sa.key" -pubout -out "$PKI/sa.pub" 2>/dev/null; }
  mkcert admin /O=system:masters/CN=admin clientAuth
  mkcert kube-proxy /CN=system:kube-proxy clientAuth
  mkkubeconfig "$DATA/kube-proxy.kubeconfig" kube-proxy
  local c
  for c in kube-controller-manager kube-scheduler; do
    mkcert $c /CN=system:$c clientAuth
    mkkubeconfig "$DATA/$c.kubeconfig" $c
  done
}

ready() { [ "$(in_cp curl -s --noproxy '*' --max-time 2 --cacert "$PKI/ca.crt" --cert "$PKI/admin.crt" --key "$PKI/admin.key" $API/readyz 2>/dev/null)" = ok ]; }
ready_or_dead() { ready || ! alive "$DATA/kube-apiserver"; }

cp_run() { # NAME ARGS...: a program of the control plane, unless it runs
  local name=$1; shift
  alive "$DATA/$name" || run "$DATA/$name" nsenter --net="$ns" -- "$BIN/$name" "$@"
}

cp_up() {
  local ns services=10.96.0.0/24
  [ ! -e "$RUN" ] || [ -O "$RUN" ] || die "$RUN belongs to somebody else"
  mkdir -p -m 700 "$RUN"
  [ -s "$RUN/options" ] || declare -p DUAL_STACK 2>/dev/null >"$RUN/options" || true
  . "$RUN/options"
  [ -z "${DUAL_STACK:-}" ] || services=$services,fd00:96::/112
  cp_network
  ns=$(netns $CP)
  pki
  cp_run etcd --name=e --data-dir="$DATA/etcd" --unsafe-no-fsync=true --log-level=warn \
    --listen-client-urls=http://127.0.0.1:2379 --advertise-client-urls=http://127.0.0.1:2379 \
    --listen-peer-urls=http://127.0.0.1:2380 --initial-advertise-peer-urls=http://127.0.0.1:2380 \
    --initial-cluster=e=http://127.0.0.1:2380
  cp_run kube-apiserver --etcd-servers=http://127.0.0.1:2379 \
    --bind-address=172.30.0.1 --secure-port=6443 --advertise-address=172.30.0.1 --service-cluster-ip-range=$services \
    --tls-cert-file="$PKI/apiserver.crt" --tls-private-key-file="$PKI/apiserver.key" --client-ca-file="$PKI/ca.crt" \
    --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged=true \
    --service-account-key-file="$PKI/sa.pub" --service-account-signing-key-file="$PKI/sa.key" \
    --service-account-issuer=$API --service-account-jwks-uri=$API/openid/v1/jwks \
    --kubelet-client-certificate="$PKI/apiserver-kubelet-client.crt" --kubelet-client-key="$PKI/apiserver-kubelet-client.key" \
    --kubelet-certificate-authority="$PKI/ca.crt" --kubelet-preferred-address-types=InternalIP \
    --requestheader-client-ca-file="$PKI/front-proxy-ca.crt" --requestheader-allowed-names=front-proxy-client \
    --requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group --requestheader-extra-headers-prefix=X-Remote-Extra- \
    --proxy-client-cert-file="$PKI/front-proxy-client.crt" --proxy-client-key-file="$PKI/front-proxy-client.key" \
    --profiling=false --v=1
  if ! alive "$DATA/fabric"; then
    rm -f "$RUN/fabric.sock" "$RUN/api"
    run "$DATA/fabric" "$BIN/fabric" -netns "$ns" -cert "$PKI/aws.crt" -key "$PKI/aws.key" -ca "$PKI/ca.crt" -socket "$RUN/fabric.sock" -api "$RUN/api"
  fi
  until_ok 10 "fabric" [ -S "$RUN/fabric.sock" ] || die "$(tail -5 "$DATA/fabric.log")"
  mkkubeconfig "$RUN/kubeconfig" admin "https://$(cat "$RUN/api")"
  until_ok 60 "kube-apiserver" ready_or_dead && ready || die "$(tail -5 "$DATA/kube-apiserver.log")"
  local kcm=$DATA/kube-controller-manager.kubeconfig ks=$DATA/kube-scheduler.kubeconfig
  # A node that is cut off is found after 8 s, not 40: tests wait for it.
  cp_run kube-controller-manager --kubeconfig="$kcm" --authentication-kubeconfig="$kcm" --authorization-kubeconfig="$kcm" \
    --service-account-private-key-file="$PKI/sa.key" --root-ca-file="$PKI/ca.crt" --use-service-account-credentials=true \
    --cluster-signing-cert-file="$PKI/ca.crt" --cluster-signing-key-file="$PKI/ca.key" --node-monitor-grace-period=8s --node-monitor-period=1s \
    --leader-elect=false --bind-address=127.0.0.1 --profiling=false --v=1
  cp_run kube-scheduler --kubeconfig="$ks" --authentication-kubeconfig="$ks" --authorization-kubeconfig="$ks" \
    --leader-elect=false --bind-address=127.0.0.1 --profiling=false --v=1
  # Anybody may read the keys that sign service account tokens, as at the public OIDC endpoint of a real cluster. The
  # daemon trusts the lab's AWS by the ConfigMap (values.yaml); pods' images hold its authority.
  kubectl apply -f "$here/coredns.yaml" -f - >/dev/null <<K
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: public-service-account-issuer-discovery}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:service-account-issuer-discovery"}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: "system:unauthenticated"}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: aws-ca, namespace: kube-system}
data:
  ca.crt: |
$(sed 's/^/    /' "$CACHE/images/aws-ca.crt")
K
}

cp_down() {
  local n
  for n in kube-scheduler kube-controller-manager kube-apiserver etcd fabric; do stop "$DATA/$n"; done
}

# What no pid file knows of: namespaces and cgroups of our name, and the processes inside of them.
leftovers() {
  local n p d
  for n in /run/netns/$P-cp /run/netns/$P-node[1-9]; do
    [ -e "$n" ] || continue
    n=${n##*/}
    if netns "$n" >/dev/null; then
      for p in $(ip netns pids "$n"); do kill -9 "$p" 2>/dev/null || true; done
    fi
    ip netns del "$n" 2>/dev/null || { umount -l /run/netns/"$n" 2>/dev/null; rm -f /run/netns/"$n"; }
  done
  for d in $(find /sys/fs/cgroup -type d -name "$P-node[1-9]" 2>/dev/null); do remove_cgroup "$d"; done
}

status() {
  alive "$DATA/kube-apiserver" || { echo "cluster: not up"; return 1; }
  echo "cluster: KUBECONFIG=$RUN/kubeconfig"
  kubectl get nodes
}
