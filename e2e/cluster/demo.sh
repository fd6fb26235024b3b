#!/usr/bin/env bash
# demo.sh: a cluster of two nodes, the chart, and two pods on each node: one whose service account names a role, one without.
# Shows what the AWS CLI says in each, and leaves all of it up. `cluster.sh down` removes it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cluster=$here/cluster.sh
bin=${XDG_CACHE_HOME:-$HOME/.cache}/imdsgate-e2e/bin
state=/var/tmp/${CLUSTER:-imdsgate-cluster}
export KUBECONFIG=$state/kubeconfig
account=123456789012
role=arn:aws:iam::$account:role/team/cart
start=$SECONDS

step() { printf '\n\033[1m== %s\033[0m  (%d s)\n' "$*" $((SECONDS - start)); }
kubectl() { "$bin/kubectl" "$@"; }
fabric() { curl -sSf --unix-socket "$state/fabric.sock" "$@"; }

step "A Kubernetes cluster of two nodes, in network namespaces"
[ -x "$bin/helm" ] || "$here/bins/build.sh" helm
"$cluster" up
kubectl get nodes -o wide | cut -c1-100

step "Two pods on each node, before imdsgate: this is what any pod can do"
fabric -X POST http://fabric/aws/role -d @- >/dev/null <<K
{"ARN": "$role", "Allow": ["s3:ListAllMyBuckets"], "Trust": [{"AWS": "arn:aws:iam::$account:role/node-role", "Actions": ["sts:AssumeRole", "sts:TagSession"]}]}
K
kubectl apply -f - <<K
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: cart, namespace: shop}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: visitor, namespace: shop}
$(for app in cart visitor; do cat <<D
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: $app, namespace: shop}
spec:
  selector: {matchLabels: {app: $app}}
  template:
    metadata: {labels: {app: $app}}
    spec:
      serviceAccountName: $app
      terminationGracePeriodSeconds: 0
      containers: [{name: main, image: test.local/aws:1, imagePullPolicy: Never, command: [sleep, "86400"]}]
D
done)
K
for app in cart visitor; do kubectl -n shop rollout status ds/$app --timeout=90s | tail -1; done

wrong=0
ask() { # WANT: what the AWS CLI says in every pod; whose credentials those are
  local app node pod out verdict
  for app in cart visitor; do
    while read -r node pod; do
      printf '\n%s, pod %s (service account shop/%s):\n  $ aws sts get-caller-identity; aws s3 ls\n' "$node" "$pod" "$app"
      out=$(kubectl -n shop exec "$pod" -- sh -c 'aws sts get-caller-identity --query Arn --output text; aws s3 ls' </dev/null 2>&1) || true
      sed '/^$/d;/command terminated/d;s/^/  /' <<<"$out"
      verdict=WRONG
      case $1-$app in
        node-*) ! grep -q assumed-role/node-role <<<"$out" || verdict='the NODE role: this is what imdsgate stops' ;;
        own-cart) ! grep -q assumed-role/cart/ <<<"$out" || ! grep -q ledger <<<"$out" || verdict='its own role' ;;
        own-visitor) ! grep -q 'Unable to locate credentials' <<<"$out" || grep -q assumed-role <<<"$out" || verdict="no credentials, and not the node's" ;;
      esac
      printf '  => %s\n' "$verdict"
      [ "$verdict" != WRONG ] || wrong=1
    done < <(kubectl -n shop get pods -l app=$app -o 'jsonpath={range .items[*]}{.spec.nodeName} {.metadata.name}{"\n"}{end}' | sort)
  done
}
installed() { "$bin/helm" status imdsgate -n kube-system >/dev/null 2>&1; }
if installed; then echo "imdsgate is installed already, by an earlier demo"; else ask node; fi

step "imdsgate, installed by its chart"
"$cluster" daemon
"$bin/helm" upgrade --install imdsgate "$here/../../deploy/chart" -n kube-system -f "$here/values.yaml" >/dev/null
kubectl -n kube-system rollout status ds/imdsgate --timeout=120s | tail -1
kubectl annotate --overwrite serviceaccount -n shop cart eks.amazonaws.com/role-arn=$role
kubectl annotate --overwrite namespace shop iam.amazonaws.com/allowed-roles="[\"$role\"]"
kubectl -n kube-system get pods -o wide | cut -c1-90

step "The same pods, not restarted"
# Answered as soon as the daemon has heard of the annotation.
for pod in $(kubectl -n shop get pods -l app=cart -o name); do
  for i in $(seq 50); do
    code=$(kubectl -n shop exec "$pod" -- curl -s -m3 -o /dev/null -w '%{http_code}' http://169.254.169.254/latest/meta-data/iam/security-credentials/ || true)
    [ "$code" != 200 ] || break
    sleep 0.2
  done
done
ask own

cat <<K


$([ $wrong = 0 ] && echo "Both scenarios as promised" || echo "NOT as promised: see WRONG above"), after $((SECONDS - start)) s. The cluster stays up; to look further:

  export KUBECONFIG=$KUBECONFIG PATH=$bin:\$PATH
  kubectl -n shop exec -it daemonset/cart -- sh                    # aws, curl, boto3
  kubectl -n kube-system exec daemonset/imdsgate -- /imdsgate -check -all
  kubectl -n kube-system logs daemonset/imdsgate
  $cluster in node1 sh -c 'ip rule; iptables -t nat -S | grep -i imds'
  $cluster down                                                # removes all of it
K
exit $wrong
