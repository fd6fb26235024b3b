package deploy_test

import (
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
)

const taint = "imdsgate.dev/not-ready"

func TestLint(t *testing.T) {
	if out, _, err := helm(t, append([]string{"lint", "--strict", chartDir}, required...)...); err != nil {
		t.Error(out)
	}
}

// The manifest is the chart with its defaults.
func TestManifest(t *testing.T) {
	const file = deployDir + "/imdsgate.yaml"
	want := `# imdsgate with the chart's default values, for those without Helm. Made of deploy/chart by, in e2e:
#
#     go test ./deploy -run TestManifest -update
#
# imdsgate:0.1.0 is your own image: name it before kubectl apply -f.
`
	out, _ := template(t, "kube-system")
	want += out
	if *update {
		if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(got), want); diff != "" {
		t.Errorf("deploy/imdsgate.yaml is not the chart's rendering, see its first lines (-file +chart):\n%s", diff)
	}
}

// Least privilege, for every back end and mode.
func TestPrivileges(t *testing.T) {
	for _, c := range []struct {
		args []string
		want map[string][]corev1.Capability // of those that run as root
	}{
		{nil, map[string][]corev1.Capability{"guard": {"NET_ADMIN"}, "imdsgate": {"NET_ADMIN"}}},
		{[]string{"--set", "iptables=legacy"}, map[string][]corev1.Capability{"guard": {"NET_ADMIN"}, "imdsgate": {"NET_ADMIN", "NET_RAW"}}},
		{[]string{"--set", "mode=cleanup"}, map[string][]corev1.Capability{"cleanup": {"NET_ADMIN", "NET_RAW"}}},
	} {
		t.Run(strings.Join(c.args, " "), func(t *testing.T) {
			_, all := template(t, "kube-system", c.args...)
			pod := get[appsv1.DaemonSet](t, all, "DaemonSet").Spec.Template.Spec
			root := map[string][]corev1.Capability{}
			for _, container := range slices.Concat(pod.InitContainers, pod.Containers) {
				s := container.SecurityContext
				if *s.AllowPrivilegeEscalation || !*s.ReadOnlyRootFilesystem || s.Privileged != nil && *s.Privileged || s.SeccompProfile.Type != "RuntimeDefault" {
					t.Errorf("%s: %+v", container.Name, s)
				}
				if diff := cmp.Diff([]corev1.Capability{"ALL"}, s.Capabilities.Drop); diff != "" {
					t.Errorf("%s drops %s", container.Name, diff)
				}
				if *s.RunAsUser == 0 {
					root[container.Name] = s.Capabilities.Add
				} else if len(s.Capabilities.Add) > 0 {
					t.Errorf("%s adds %v", container.Name, s.Capabilities.Add)
				}
				if _, ok := container.Resources.Limits[corev1.ResourceCPU]; ok {
					t.Errorf("%s has a CPU limit", container.Name)
				}
				if len(container.Ports) > 0 {
					t.Errorf("%s declares ports: in the host network they are the node's, and two versions cannot share it", container.Name)
				}
			}
			if diff := cmp.Diff(c.want, root); diff != "" {
				t.Errorf("containers of root, and the capabilities that they add (-want +got):\n%s", diff)
			}
			if pod.HostPID || pod.HostIPC || !pod.HostNetwork || pod.PriorityClassName != "system-node-critical" || pod.Tolerations[0].Operator != "Exists" || pod.Tolerations[0].Key != "" {
				t.Errorf("the pod is %+v", pod)
			}
			for _, v := range pod.Volumes {
				if v.HostPath != nil && !slices.Contains([]string{"/run/xtables.lock", "/run/imdsgate", "/var/lib/cni"}, v.HostPath.Path) {
					t.Errorf("volume %s is the node's %s", v.Name, v.HostPath.Path)
				}
			}
		})
	}
}

// What each value brings: objects, permissions, environment.
func TestValues(t *testing.T) {
	base := []string{"ServiceAccount imdsgate", "ClusterRole imdsgate", "ClusterRoleBinding imdsgate", "DaemonSet imdsgate"}
	policy := func(name string) []string {
		return []string{"ValidatingAdmissionPolicy imdsgate-" + name, "ValidatingAdmissionPolicyBinding imdsgate-" + name}
	}
	tokens, nodes := "serviceaccounts/token create", "nodes get,patch"
	for _, c := range []struct {
		name    string
		args    []string
		objects []string
		rules   []string // besides those that every configuration needs
		env     map[string]string
		argv    []string
	}{
		{name: "defaults", objects: base, env: map[string]string{"IMDSGATE_ISSUER": "assume-role", "IMDSGATE_PORT": "8254", "IMDSGATE_STARTUP_TAINT": "", "AWS_REGION": "", "PATH": ""}},
		{
			name: "startup taint", args: []string{"--set", "startupTaint=" + taint},
			objects: slices.Concat(base, policy("startup-taint")), rules: []string{nodes}, env: map[string]string{"IMDSGATE_STARTUP_TAINT": taint},
		},
		{
			name: "web identity", args: []string{"--set", "flags.issuer=web-identity", "--set", "flags.audiences={sts.amazonaws.com,other}"},
			objects: slices.Concat(base, policy("tokens")), rules: []string{tokens}, env: map[string]string{"IMDSGATE_AUDIENCES": "sts.amazonaws.com,other"},
		},
		{
			name:    "web identity, unconfined and acknowledged",
			args:    []string{"--set", "flags.issuer=web-identity", "--set", "tokenPolicy.enabled=false", "--set", "tokenPolicy.acknowledgeUnconfinedTokens=true"},
			objects: base, rules: []string{tokens},
		},
		{
			name: "both", args: []string{"--set", "flags.issuer=web-identity", "--set", "startupTaint=" + taint},
			objects: slices.Concat(base, policy("tokens"), policy("startup-taint")), rules: []string{tokens, nodes},
		},
		{name: "cleanup has no permission", args: []string{"--set", "mode=cleanup", "--set", "flags.issuer=web-identity", "--set", "startupTaint=" + taint}, objects: []string{"ServiceAccount imdsgate", "DaemonSet imdsgate"}},
		{name: "ServiceMonitor", args: []string{"--set", "metrics.serviceMonitor.enabled=true"}, objects: slices.Concat(base, []string{"Service imdsgate-metrics", "ServiceMonitor imdsgate"})},
		{
			name:    "AWS and legacy iptables",
			args:    []string{"--set", "aws.region=eu-west-1", "--set", "aws.stsEndpoint=https://sts.example", "--set", "iptables=legacy", "--set", "extraEnv[0].name=AWS_CA_BUNDLE", "--set", "extraEnv[0].value=/ca.pem"},
			objects: base, env: map[string]string{"AWS_REGION": "eu-west-1", "AWS_ENDPOINT_URL_STS": "https://sts.example", "PATH": "/iptables/legacy:/usr/sbin:/usr/bin:/sbin:/bin", "AWS_CA_BUNDLE": "/ca.pem"},
		},
		{name: "off", args: []string{"--set-json", "flags.namespace-policy=false"}, objects: base, env: map[string]string{"IMDSGATE_NAMESPACE_POLICY": "off"}},
		{
			name: "no listeners, unknown flags", args: []string{"--set", "flags.ops-addr=,flags.debug-addr=", "--set", "extraArgs={-new=1}"},
			objects: base, argv: []string{"-ops-addr=", "-debug-addr=", "-new=1"}, env: map[string]string{"IMDSGATE_OPS_ADDR": "", "IMDSGATE_DEBUG_ADDR": ""},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, all := template(t, "kube-system", c.args...)
			got, want := all.names(), slices.Clone(c.objects)
			slices.Sort(got)
			slices.Sort(want)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("objects (-want +got):\n%s", diff)
			}
			ds := get[appsv1.DaemonSet](t, all, "DaemonSet")
			if slices.Contains(c.objects, "ClusterRole imdsgate") {
				var rules []string
				for _, r := range get[rbacv1.ClusterRole](t, all, "ClusterRole").Rules {
					if !slices.Equal(r.APIGroups, []string{""}) || len(r.ResourceNames)+len(r.NonResourceURLs) > 0 {
						t.Errorf("unexpected rule %+v", r)
					}
					rules = append(rules, strings.Join(r.Resources, ",")+" "+strings.Join(r.Verbs, ","))
				}
				want := append([]string{"pods list,watch", "serviceaccounts,namespaces list,watch", "events create,patch"}, c.rules...)
				if diff := cmp.Diff(want, rules); diff != "" {
					t.Errorf("rules (-want +got):\n%s", diff)
				}
			}
			container := ds.Spec.Template.Spec.Containers[0]
			env := environment(container)
			for name, want := range c.env {
				if env[name] != want {
					t.Errorf("%s is %q, want %q", name, env[name], want)
				}
			}
			if c.argv != nil && !slices.Equal(container.Args, c.argv) {
				t.Errorf("arguments are %q, want %q", container.Args, c.argv)
			}
		})
	}
}

// The first container of a pod installs the guard that the daemon then keeps: of the same image, configured alike, with nothing of
// the node's files. Without a guard to keep there is none, and never before a cleanup.
func TestGuardComesFirst(t *testing.T) {
	_, all := template(t, "kube-system", "--set", "flags.guard-priority=7,flags.debug-addr=,extraArgs={-new=1},aws.region=eu-west-1")
	pod := get[appsv1.DaemonSet](t, all, "DaemonSet").Spec.Template.Spec
	if len(pod.InitContainers) != 1 {
		t.Fatalf("init containers: %+v", pod.InitContainers)
	}
	guard, daemon := pod.InitContainers[0], pod.Containers[0]
	if guard.Image != daemon.Image || len(guard.VolumeMounts) > 0 || guard.RestartPolicy != nil {
		t.Errorf("the guard is %+v", guard)
	}
	if diff := cmp.Diff(append([]string{"-guard-only"}, daemon.Args...), guard.Args); diff != "" {
		t.Errorf("arguments (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(environment(daemon), environment(guard)); diff != "" || environment(guard)["IMDSGATE_GUARD_PRIORITY"] != "7" {
		t.Errorf("environment (-daemon +guard):\n%s", diff)
	}
	for set, want := range map[string]string{"flags.guard=false": "", "mode=cleanup": "cleanup"} {
		_, all := template(t, "kube-system", "--set", set)
		names := ""
		for _, c := range get[appsv1.DaemonSet](t, all, "DaemonSet").Spec.Template.Spec.InitContainers {
			names += c.Name
		}
		if names != want {
			t.Errorf("%s: init containers %q, want %q", set, names, want)
		}
	}
}

// The node's CNI results are mounted read-only, by the directory above them, which the runtime may make anew; only while they
// are read, and for the daemon alone.
func TestCNIResults(t *testing.T) {
	mount := func(args ...string) string {
		_, all := template(t, "kube-system", args...)
		pod := get[appsv1.DaemonSet](t, all, "DaemonSet").Spec.Template.Spec
		found := ""
		for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
			for _, m := range c.VolumeMounts {
				for _, v := range pod.Volumes {
					if m.Name == v.Name && v.Name == "cni" {
						found += fmt.Sprint(c.Name, " ", v.HostPath.Path, " at ", m.MountPath, " read-only ", m.ReadOnly)
					}
				}
			}
		}
		return found
	}
	for args, want := range map[string]string{
		"flags.guard=true":               "imdsgate /var/lib/cni at /var/lib/cni read-only true",
		"flags.cni-results=/run/x/cache": "imdsgate /run/x at /run/x read-only true",
		"flags.cni-results=":             "",
		"mode=cleanup":                   "",
	} {
		if got := mount("--set", args); got != want {
			t.Errorf("%s: %q, want %q", args, got, want)
		}
	}
}

func environment(c corev1.Container) map[string]string {
	env := map[string]string{}
	for _, e := range c.Env {
		env[e.Name] = e.Value
		if e.ValueFrom != nil {
			env[e.Name] = "$" + e.ValueFrom.FieldRef.FieldPath
		}
	}
	return env
}

// The update takes over before the old instance ends; the cleanup waits until it has ended, or it would put the rules back.
func TestUpdateStrategy(t *testing.T) {
	for mode, want := range map[string][2]string{"run": {"1", "0"}, "cleanup": {"0", "100%"}} {
		_, all := template(t, "kube-system", "--set", "mode="+mode)
		r := get[appsv1.DaemonSet](t, all, "DaemonSet").Spec.UpdateStrategy.RollingUpdate
		if got := [2]string{r.MaxSurge.String(), r.MaxUnavailable.String()}; got != want {
			t.Errorf("%s: maxSurge and maxUnavailable are %v, want %v", mode, got, want)
		}
	}
}

// Contradictions, unknown names and wrong types end the rendering with what to do.
func TestRefusals(t *testing.T) {
	for _, c := range []struct{ set, want string }{
		{"image.repository=", "image.repository is required"},
		{"image.repository=x:1.0", "its tag is image.tag"},
		{"image.repository=x@sha256:0", "its digest image.digest"},
		{"imag.repository=x", "additional properties 'imag'"},
		{"flags.isuer=web-identity", "additional properties 'isuer'"},
		{"flags.issuer=webidentity", "/flags/issuer"},
		{"flags.imdsv1=no", "/flags/imdsv1"},
		{"flags.port=65535", "/flags/port"},
		{"flags.session-duration=60", "/flags/session-duration"},
		{"flags.allow={a\\,b}", "/flags/allow"},
		{"flags.sts-rate=0", "/flags/sts-rate"},
		{"flags.issuer=web-identity,flags.default-role=x", "flags.default-role does nothing"},
		{"flags.issuer=web-identity,flags.session-tags=true", "flags.session-tags does nothing"},
		{"flags.issuer=web-identity,flags.intermediate-role-arn=arn:aws:iam::123456789012:role/x", "flags.intermediate-role-arn does nothing"},
		{"flags.issuer=web-identity,flags.audiences=null", "/flags"},
		{"flags.issuer=web-identity,flags.audiences={https://kubernetes.default.svc.cluster.local}", "audience of the API server"},
		{"flags.issuer=web-identity,flags.audiences={a b}", "must not hold"},
		{"flags.issuer=web-identity,tokenPolicy.enabled=false", "tokenPolicy.acknowledgeUnconfinedTokens"},
		{"tokenPolicy.maxExpirationSeconds=90000", "maxExpirationSeconds"},
		{"startupTaint=a=b:NoSchedule", "the key alone, such as imdsgate.dev/not-ready"},
		{"startupTaint=a b", "the key alone"},
		{"flags.base-role-arn=reporting", "must be auto, or what short role names are completed with"},
		{"flags.intermediate-role-arn=arn:aws:iam::123456789012:role", "flags.intermediate-role-arn"},
		{"flags.ops-addr=:8254", "pod-facing"},
		{"flags.debug-addr=127.0.0.1:8255", "pod-facing"},
		{"flags.debug-addr=,flags.pprof=true", "flags.pprof needs"},
		{"flags.ops-addr=,metrics.serviceMonitor.enabled=true", "needs flags.ops-addr"},
		{"flags.redirect=none,flags.guard=false", "nothing between pods and the node's role"},
		{"extraArgs={-port=80}", "set flags.port instead"},
		{"extraArgs={--startup-taint=x}", "set startupTaint instead"},
		{"extraArgs={-cleanup}", "the chart decides this flag"},
		{"extraArgs={-guard-only}", "the chart decides this flag"},
		{"extraArgs={oops}", "/extraArgs/0"},
		{"extraEnv[0].name=IMDSGATE_ISSUER,extraEnv[0].value=x", "set flags instead"},
		{"extraEnv[0].name=NODE_NAME,extraEnv[0].value=x", "the chart sets it"},
		{"resources.limits.cpu=1", "resources.limits.cpu"},
		{"updateStrategy.maxSurge=0", "maxSurge"},
		{"mode=clean", "/mode"},
		{"iptables=auto", "/iptables"},
	} {
		t.Run(c.set, func(t *testing.T) {
			_, stderr, err := helm(t, append(append([]string{"template", "imdsgate", chartDir}, required...), "--set", c.set)...)
			if err == nil || !strings.Contains(stderr, c.want) {
				t.Errorf("err = %v, want one that says %q:\n%s", err, c.want, stderr)
			}
		})
	}
}

// Every flag of the daemon has a value with the daemon's own default, or is the chart's business.
func TestFlags(t *testing.T) {
	help, err := os.ReadFile("../../cmd/imdsgate/testdata/help.golden")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(chartDir + "/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var values struct{ Flags map[string]any }
	if err := yaml.Unmarshal(text, &values); err != nil {
		t.Fatal(err)
	}
	chart := []string{"node", "host-ip", "kubeconfig", "state-dir", "probe-socket", "startup-taint", "cleanup", "check", "all", "guard-only", "probe", "version"}
	known := maps.Clone(values.Flags)
	for _, m := range regexp.MustCompile(`(?m)^  -([a-z0-9-]+).*\n +\t(.*)$`).FindAllStringSubmatch(string(help), -1) {
		name, usage := m[1], m[2]
		value, ok := values.Flags[name]
		delete(known, name)
		if ok == slices.Contains(chart, name) {
			t.Errorf("flag -%s: either a value flags.%s or the chart's own", name, name)
		}
		if !ok {
			continue
		}
		want := ""
		if d := regexp.MustCompile(`\(default ([^)]+)\)$`).FindStringSubmatch(usage); d != nil {
			want = d[1]
		}
		if got := normal(value); got != normal(want) {
			t.Errorf("flags.%s is %q, the daemon's default %q", name, got, normal(want))
		}
	}
	if len(known) > 0 {
		t.Errorf("values for flags that the daemon does not have: %v", slices.Sorted(maps.Keys(known)))
	}
}

// normal writes values alike that mean the same.
func normal(v any) string {
	switch v := v.(type) {
	case bool:
		if !v {
			return "" // -help prints no default
		}
		return "true"
	case float64:
		return strconv.FormatFloat(v, 'f', -1, 64)
	case []any:
		var list []string
		for _, e := range v {
			list = append(list, normal(e))
		}
		return strings.Join(list, ",")
	case string:
		if d, err := time.ParseDuration(v); err == nil && v != "0" {
			return d.String()
		}
		return strings.ToLower(v)
	}
	return ""
}

// The notes say what an uninstall leaves, and how to open the nodes first.
func TestNotes(t *testing.T) {
	for mode, want := range map[string][]string{
		"run":     {"helm uninstall leaves the nodes closed", "--set mode=cleanup", "rollout status daemonset/imdsgate", "/imdsgate -check"},
		"cleanup": {"rollout status daemonset/imdsgate", "helm -n kube-system uninstall imdsgate", "reaches the node's own role"},
	} {
		out, stderr, err := helm(t, append([]string{"install", "imdsgate", chartDir, "-n", "kube-system", "--dry-run=client", "--set", "mode=" + mode}, required...)...)
		if err != nil {
			t.Fatal(stderr)
		}
		_, notes, _ := strings.Cut(out, "NOTES:")
		for _, text := range want {
			if !strings.Contains(notes, text) {
				t.Errorf("the notes of mode %s do not say %q:\n%s", mode, text, notes)
			}
		}
	}
}

// What the ServiceMonitor finds is the port of flags.ops-addr, also of pods that are not ready.
func TestServiceMonitor(t *testing.T) {
	_, all := template(t, "kube-system", "--set", "metrics.serviceMonitor.enabled=true", "--set", "flags.ops-addr=:9555")
	s := get[corev1.Service](t, all, "Service")
	if p := s.Spec.Ports[0]; len(s.Spec.Ports) != 1 || p.Port != 9555 || p.TargetPort.IntValue() != 9555 || s.Spec.ClusterIP != "None" || !s.Spec.PublishNotReadyAddresses {
		t.Errorf("the Service is %+v", s.Spec)
	}
	pod := get[appsv1.DaemonSet](t, all, "DaemonSet").Spec.Template.Labels
	for key, value := range s.Spec.Selector {
		if pod[key] != value {
			t.Errorf("the Service selects %s=%s, which the pods have not", key, value)
		}
	}
}
