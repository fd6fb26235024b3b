{{- define "imdsgate.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "imdsgate.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "imdsgate.labels" -}}
{{ include "imdsgate.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "imdsgate.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "imdsgate.fullname" .) }}
{{- end }}

{{- define "imdsgate.username" -}}
system:serviceaccount:{{ .Release.Namespace }}:{{ include "imdsgate.serviceAccount" . }}
{{- end }}

{{- define "imdsgate.image" -}}
{{- $i := .Values.image -}}
{{- if $i.digest }}{{ $i.repository }}@{{ $i.digest }}{{ else }}{{ $i.repository }}:{{ $i.tag | default .Chart.AppVersion }}{{ end }}
{{- end }}

{{- /* Contradictions that no schema can express. */ -}}
{{- define "imdsgate.validate" -}}
{{- $v := .Values -}}
{{- $f := $v.flags -}}
{{- if not $v.image.repository }}{{ fail "image.repository is required: build the image with the Dockerfile, push it to your registry and name it here" }}{{ end }}
{{- /* In words, where a schema's pattern would be all that people see. */ -}}
{{- if not (regexMatch "^([^:@\\s]|:[0-9]+/)*$" $v.image.repository) }}{{ fail (printf "image.repository %q: the name alone; its tag is image.tag, its digest image.digest" $v.image.repository) }}{{ end }}
{{- if not (regexMatch "^(auto|arn:[a-z-]+:iam:[^:]*:[^:]*:role(/.*)?)?$" (index $f "base-role-arn")) }}{{ fail (printf "flags.base-role-arn %q: must be auto, or what short role names are completed with, such as arn:aws:iam::123456789012:role/" (index $f "base-role-arn")) }}{{ end }}
{{- if not (regexMatch "^(arn:[a-z-]+:iam:[^:]*:[^:]*:role/.+)?$" (index $f "intermediate-role-arn")) }}{{ fail (printf "flags.intermediate-role-arn %q: must be the ARN of a role, such as arn:aws:iam::123456789012:role/hop" (index $f "intermediate-role-arn")) }}{{ end }}
{{- if not (regexMatch "^((([a-z0-9]([-a-z0-9]*[a-z0-9])?\\.)*[a-z0-9]([-a-z0-9]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$" $v.startupTaint) }}{{ fail (printf "startupTaint %q: the key alone, such as imdsgate.dev/not-ready, without value and effect" $v.startupTaint) }}{{ end }}
{{- if eq $f.issuer "web-identity" }}
  {{- range $name := list "default-role" "intermediate-role-arn" "session-tags" }}
    {{- if index $f $name }}{{ fail (printf "flags.%s does nothing with flags.issuer web-identity: the service account's own token assumes its role; leave it out" $name) }}{{ end }}
  {{- end }}
  {{- if not $f.audiences }}{{ fail "flags.audiences is empty: name at least one, such as sts.amazonaws.com" }}{{ end }}
  {{- if not (or $v.tokenPolicy.enabled $v.tokenPolicy.acknowledgeUnconfinedTokens) }}{{ fail "tokenPolicy.enabled false lets the daemon make tokens of every service account for every audience, which is as good as cluster-admin: leave it on, or set tokenPolicy.acknowledgeUnconfinedTokens" }}{{ end }}
{{- end }}
{{- range $f.audiences }}
  {{- if or (hasPrefix "https://kubernetes.default.svc" .) (eq . "kubernetes") }}{{ fail (printf "flags.audiences %q is an audience of the API server: a pod's token sent to STS would open the cluster; use one of STS's own" .) }}{{ end }}
  {{- if regexMatch "[,\"'\\\\\\s]" . }}{{ fail (printf "flags.audiences %q: must not hold a comma, a quote, a backslash or a space" .) }}{{ end }}
{{- end }}
{{- range $name := list "ops-addr" "debug-addr" }}
  {{- $port := index $f $name | splitList ":" | last }}
  {{- if and $port (has (int $port) (list (int $f.port) (add (int $f.port) 1 | int))) }}{{ fail (printf "flags.%s %q: port %s is pod-facing (flags.port and the next)" $name (index $f $name) $port) }}{{ end }}
{{- end }}
{{- if hasKey ($v.resources.limits | default dict) "cpu" }}{{ fail "resources.limits.cpu: a throttled daemon misses the SDKs' time limits; set resources.requests.cpu instead" }}{{ end }}
{{- if and $f.pprof (not (index $f "debug-addr")) }}{{ fail "flags.pprof needs flags.debug-addr" }}{{ end }}
{{- if and $v.metrics.serviceMonitor.enabled (not (index $f "ops-addr")) }}{{ fail "metrics.serviceMonitor needs flags.ops-addr: there is nothing to scrape" }}{{ end }}
{{- if and (eq $f.redirect "none") (not $f.guard) }}{{ fail "flags.redirect none and flags.guard false together leave nothing between pods and the node's role; to uninstall, use mode cleanup" }}{{ end }}
{{- range $v.extraArgs }}
  {{- $name := regexReplaceAll "^--?" . "" | splitList "=" | first }}
  {{- if hasKey $f $name }}{{ fail (printf "extraArgs %q: set flags.%s instead" . $name) }}{{ end }}
  {{- if eq $name "startup-taint" }}{{ fail (printf "extraArgs %q: set startupTaint instead, which also grants the permission" .) }}{{ end }}
  {{- if has $name (list "node" "host-ip" "kubeconfig" "state-dir" "probe-socket" "cleanup" "check" "all" "guard-only" "probe" "version") }}{{ fail (printf "extraArgs %q: the chart decides this flag" .) }}{{ end }}
{{- end }}
{{- range $v.extraEnv }}
  {{- if hasPrefix "IMDSGATE_" .name }}{{ fail (printf "extraEnv %s: set flags instead, so that permissions and policies follow" .name) }}{{ end }}
  {{- if has .name (list "NODE_NAME" "HOST_IP" "PATH" "AWS_REGION" "AWS_ENDPOINT_URL_STS") }}{{ fail (printf "extraEnv %s: the chart sets it (aws.region, aws.stsEndpoint, iptables, downward API)" .name) }}{{ end }}
{{- end }}
{{- end }}

{{- /* Every flag with a value, as IMDSGATE_NAME. An empty one is the daemon's "none" and its default, but for the addresses and
the CNI results, which the arguments set. */ -}}
{{- define "imdsgate.env" -}}
- name: NODE_NAME
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
- name: HOST_IP # both families of a dual-stack node, comma separated
  valueFrom: {fieldRef: {fieldPath: status.hostIPs}}
{{- range $name, $value := .Values.flags }}
{{- if kindIs "slice" $value }}{{ $value = join "," $value }}{{ end }}
{{- if and (eq $name "namespace-policy") (not $value) }}{{ $value = "off" }}{{ end }}
{{- if ne (toString $value) "" }}
- {name: IMDSGATE_{{ $name | upper | replace "-" "_" }}, value: {{ toString $value | quote }}}
{{- end }}
{{- end }}
{{- with .Values.startupTaint }}
- {name: IMDSGATE_STARTUP_TAINT, value: {{ . | quote }}}
{{- end }}
{{- with .Values.aws.region }}
- {name: AWS_REGION, value: {{ . | quote }}}
{{- end }}
{{- with .Values.aws.stsEndpoint }}
- {name: AWS_ENDPOINT_URL_STS, value: {{ . | quote }}}
{{- end }}
{{- if eq .Values.iptables "legacy" }}
- {name: PATH, value: "/iptables/legacy:/usr/sbin:/usr/bin:/sbin:/bin"}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "imdsgate.args" -}}
{{- $args := list -}}
{{- range $name := list "ops-addr" "debug-addr" "cni-results" }}{{ if not (index $.Values.flags $name) }}{{ $args = append $args (printf "-%s=" $name) }}{{ end }}{{ end -}}
{{- concat $args .Values.extraArgs | toJson -}}
{{- end }}

{{- define "imdsgate.mounts" -}}
- {name: xtables-lock, mountPath: /run/xtables.lock}
- {name: state, mountPath: /run/imdsgate}
{{- end }}

{{- /* Of root, who uses iptables-legacy or not: a cleanup looks for rules in both back ends, the guard needs neither. */ -}}
{{- define "imdsgate.securityContext" -}}
runAsUser: 0 # iptables and the state directory are root's
runAsGroup: 0
privileged: false
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  add:
    - NET_ADMIN # routing rules, iptables, conntrack
    {{- if first . }}
    - NET_RAW # iptables-legacy reads its tables through a raw socket
    {{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end }}
