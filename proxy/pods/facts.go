package pods

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imdsgate/imdsgate/proxy"
)

// How much of an annotation is kept, in bytes: users must not be able to fill our memory. Both are longer than anything
// that proxy.Policy takes, so that what is cut was refused and is refused.
const (
	maxAnnotation          = 4 << 10 // of a pod or service account
	maxNamespaceAnnotation = 64 << 10
)

// facts are what is kept of a Pod.
type facts struct {
	pod         proxy.Pod
	annotations map[string]string // those that proxy.Policy reads
	ips         []netip.Addr      // none if the pod cannot be a caller
	node        string
	phase       corev1.PodPhase
	hostNetwork bool
	ownSource   bool   // its SDKs get credentials without asking the metadata endpoint
	quiet       string // a variable of its containers by which SDKs do not ask the metadata endpoint, or by way of a proxy
	static      string // of a mirror: the UID of its static pod
	terminating bool
	ended       bool      // its containers will never run again
	started     time.Time // status.startTime: the kubelet took it on
	firstRun    time.Time // before its first container started; zero if unknown or if one restarted
}

// serving reports whether the pod can ask us for credentials, now or later.
func (f *facts) serving() bool { return !f.ended && !f.hostNetwork }

// podFacts is total: objects may hold anything.
func podFacts(o *corev1.Pod) facts {
	f := facts{
		pod: proxy.Pod{
			UID: string(o.UID), Namespace: o.Namespace, Name: o.Name, ServiceAccount: o.Spec.ServiceAccountName,
		},
		annotations: keepMistyped(o.Annotations, keep(o.Annotations, maxAnnotation, proxy.AnnotationRoleARN, proxy.AnnotationPodRole, proxy.AnnotationPodExternalID,
			proxy.AnnotationPodSessionName)),
		node:        o.Spec.NodeName,
		phase:       o.Status.Phase,
		hostNetwork: o.Spec.HostNetwork,
		terminating: o.DeletionTimestamp != nil,
		ownSource:   slices.ContainsFunc(o.Spec.Containers, ownSource) || slices.ContainsFunc(o.Spec.InitContainers, ownSource),
		firstRun:    firstRun(&o.Status),
	}
	for _, c := range slices.Concat(o.Spec.InitContainers, o.Spec.Containers) {
		f.quiet = cmp.Or(f.quiet, quiet(c))
	}
	if static, mirror := o.Annotations[corev1.MirrorPodAnnotationKey]; mirror {
		f.pod.ServiceAccount = "" // a static pod, whatever else is written into the API server's copy
		if len(static) <= maxResultName {
			f.static = strings.Clone(static)
		}
	}
	f.ended = f.phase == corev1.PodSucceeded || f.phase == corev1.PodFailed || f.terminating && containersEnded(&o.Status)
	if f.ended {
		f.annotations = nil // nothing is decided any more, and thousands of such pods may be left on a node
	}
	if t := o.Status.StartTime; t != nil {
		f.started = t.Time
	}
	if f.serving() {
		f.ips = podIPs(&o.Status)
	}
	return f
}

func podIPs(s *corev1.PodStatus) []netip.Addr {
	var ips []netip.Addr
	add := func(text string) {
		// What is no address is left out: kiam's index function panicked on what users wrote, and took the node down.
		if ip, err := netip.ParseAddr(text); err == nil && !slices.Contains(ips, ip.Unmap()) {
			ips = append(ips, ip.Unmap())
		}
	}
	for _, ip := range s.PodIPs {
		add(ip.IP)
	}
	add(s.PodIP)
	return ips
}

func ownSource(c corev1.Container) bool {
	return slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool {
		return e.Name == "AWS_WEB_IDENTITY_TOKEN_FILE" || e.Name == "AWS_CONTAINER_CREDENTIALS_FULL_URI"
	})
}

// Variables by which SDKs that heed them do not ask the metadata endpoint, or a proxy instead.
const (
	envDisabled  = "AWS_EC2_METADATA_DISABLED"
	envKey       = "AWS_ACCESS_KEY_ID"
	envProxy     = "HTTP_PROXY"
	envNoProxy   = "NO_PROXY"
	endpointHost = "169.254.169.254"
)

// quiet is the first of them that a container sets; empty: none.
func quiet(c corev1.Container) string {
	value := func(name string) string {
		i := slices.IndexFunc(c.Env, func(e corev1.EnvVar) bool { return strings.EqualFold(e.Name, name) })
		switch {
		case i < 0:
			return ""
		case c.Env[i].ValueFrom != nil:
			return "?"
		}
		return c.Env[i].Value
	}
	switch {
	case strings.EqualFold(value(envDisabled), "true"):
		return envDisabled
	case value(envKey) != "":
		return envKey
	case value(envProxy) != "" && !strings.Contains(value(envNoProxy), endpointHost) && !strings.ContainsAny(value(envNoProxy), "*?/"): // a network may hold it
		return envProxy
	}
	return ""
}

// containersEnded reports whether no container of a terminating pod runs any more. A sidecar may outlive the others.
func containersEnded(s *corev1.PodStatus) bool {
	running := func(c corev1.ContainerStatus) bool { return c.State.Running != nil }
	terminated := func(c corev1.ContainerStatus) bool { return c.State.Terminated != nil }
	return len(s.ContainerStatuses) > 0 &&
		!slices.ContainsFunc(s.ContainerStatuses, func(c corev1.ContainerStatus) bool { return !terminated(c) }) &&
		!slices.ContainsFunc(s.InitContainerStatuses, running) && !slices.ContainsFunc(s.EphemeralContainerStatuses, running)
}

// startDelay is how much later than a container's first instruction its startedAt may be. containerd notes it when its call to
// start the process has returned: up to seconds late on a node that starts 80 pods at once, where a pod's first token was
// taken for that of an IP's earlier holder, between the list and the document.
const startDelay = 10 * time.Second

// firstRun is a time before the first container of a pod started. With a restart that moment is forgotten: then it is zero.
func firstRun(s *corev1.PodStatus) time.Time {
	var first time.Time
	for _, c := range slices.Concat(s.InitContainerStatuses, s.ContainerStatuses) {
		var at metav1.Time
		switch {
		case c.RestartCount != 0:
			return time.Time{}
		case c.State.Running != nil:
			at = c.State.Running.StartedAt
		case c.State.Terminated != nil:
			if at = c.State.Terminated.StartedAt; at.IsZero() {
				return time.Time{} // it ran, nobody knows when
			}
		}
		if !at.IsZero() && (first.IsZero() || at.Time.Before(first)) {
			first = at.Time
		}
	}
	if first.IsZero() {
		return first
	}
	return first.Add(-startDelay)
}

// keep returns the named annotations, cut to limit.
func keep(annotations map[string]string, limit int, names ...string) map[string]string {
	var kept map[string]string
	for _, name := range names {
		v, ok := annotations[name]
		if !ok {
			continue
		}
		if kept == nil {
			kept = make(map[string]string, len(names))
		}
		if len(v) > limit {
			v = strings.Clone(v[:limit]) // a slice would keep all of it
		}
		kept[name] = v
	}
	return kept
}

// keepMistyped adds an annotation that was meant to name a role, if nothing does: one of them, the first by name.
func keepMistyped(annotations, kept map[string]string) map[string]string {
	if kept[proxy.AnnotationRoleARN] != "" || kept[proxy.AnnotationPodRole] != "" {
		return kept
	}
	var found string
	for name, v := range annotations {
		if (found == "" || name < found) && proxy.Mistyped(name, v) {
			found = name
		}
	}
	if found == "" {
		return kept
	}
	if kept == nil {
		kept = make(map[string]string, 1)
	}
	kept[found] = annotations[found]
	return kept
}

// object is what is kept of a ServiceAccount or a Namespace; the zero value is one that does not exist.
type object struct {
	present     bool
	uid         types.UID
	annotations map[string]string
}

func (o object) equal(b object) bool {
	return o.present == b.present && o.uid == b.uid && maps.Equal(o.annotations, b.annotations)
}

func accountFacts(o *corev1.ServiceAccount) object {
	return object{true, o.UID, keepMistyped(o.Annotations, keep(o.Annotations, maxAnnotation, proxy.AnnotationRoleARN, proxy.AnnotationAudience,
		proxy.AnnotationTokenExpiration, proxy.AnnotationSTSRegional, proxy.AnnotationSessionDuration, proxy.AnnotationExternalID, proxy.AnnotationPodRole))}
}

func namespaceFacts(o *corev1.Namespace) object {
	return object{true, o.UID, keep(o.Annotations, maxNamespaceAnnotation, proxy.AnnotationAllowedRoles, proxy.AnnotationPermitted)}
}
