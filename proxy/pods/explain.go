package pods

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imdsgate/imdsgate/cache"
	"github.com/imdsgate/imdsgate/proxy"
)

// Explanation is what a person needs to know about one pod's answer. It holds no secret.
type Explanation struct {
	Namespace      string       `json:"namespace"`
	Name           string       `json:"name"`
	UID            string       `json:"uid"`
	ServiceAccount string       `json:"service_account"`
	IPs            []netip.Addr `json:"ips"`
	Source         string       `json:"source,omitempty"` // of its identity: api or cni; empty: nobody is found at its IPs
	Since          time.Time    `json:"since,omitzero"`
	Decision       string       `json:"decision"`         // granted, refused, unknown, or none: it never asks us
	Reason         string       `json:"reason,omitempty"` // why it is not granted, one of the Reasons
	RoleARN        string       `json:"role_arn,omitempty"`
	SessionName    string       `json:"session_name,omitempty"`
	Prefetch       bool         `json:"prefetch"`
	Steps          []Step       `json:"steps"` // how it came to that, in order

	Key *cache.Key `json:"-"` // of the credentials; nil unless granted
}

// Decisions of an Explanation.
const (
	DecisionGranted = "granted"
	DecisionRefused = "refused"
	DecisionUnknown = "unknown"
	DecisionNone    = "none"
)

// Reasons of an Explanation.
const (
	ReasonNoRole      = "no_role"
	ReasonMisplaced   = "role_misplaced" // as no_role, but the pod itself is annotated
	ReasonDenied      = "role_denied"
	ReasonInvalid     = "role_invalid"
	ReasonIncomplete  = "incomplete"
	ReasonHostNetwork = "host_network"
	ReasonEnded       = "ended"
)

// Mark says how a Step went.
type Mark string

// The marks.
const (
	OK   Mark = "ok" // as it should be
	Bad  Mark = "!!" // what stands between the pod and credentials, or will
	Note Mark = "--" // neither
)

// Step is one of the things that an answer rests on. Its text in JSON is that of String.
type Step struct {
	Mark      Mark
	About     string // a word: pod, account, namespace, role, address, credentials
	Text, Fix string
}

func (s Step) String() string {
	if s.Fix == "" {
		return s.Text
	}
	return s.Text + "; fix: " + s.Fix
}

// MarshalText implements encoding.TextMarshaler.
func (s Step) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler: all but the text is lost.
func (s *Step) UnmarshalText(text []byte) error {
	*s = Step{Text: string(text)}
	return nil
}

// Problem is the first step that went wrong.
func (e *Explanation) Problem() (Step, bool) {
	i := slices.IndexFunc(e.Steps, func(s Step) bool { return s.Mark == Bad })
	if i < 0 {
		return Step{}, false
	}
	return e.Steps[i], true
}

// Explain explains the answer to one pod; false if no such pod is bound to this node.
func (p *Pods) Explain(namespace, name string) (Explanation, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range p.pods {
		if r.pod.Namespace == namespace && r.pod.Name == name {
			return p.explain(r), true
		}
	}
	return Explanation{}, false
}

// All explains every pod that is bound to this node, by namespace and name.
func (p *Pods) All() []Explanation {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make([]Explanation, 0, len(p.pods))
	for _, r := range p.pods {
		all = append(all, p.explain(r))
	}
	slices.SortFunc(all, func(a, b Explanation) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.UID, b.UID))
	})
	return all
}

// Locate asks the API server for the node that a pod is bound to: empty if it is bound to none. Its error says that there is
// no such pod, or what kept it from asking.
func (p *Pods) Locate(ctx context.Context, namespace, name string) (node string, err error) {
	var list corev1.PodList
	err = p.client.Get().Namespace(namespace).Resource("pods").VersionedParams(&metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector(metav1.ObjectNameField, name).String(),
	}, metav1.ParameterCodec).Do(ctx).Into(&list)
	if err != nil {
		return "", fmt.Errorf("look for pod %s/%s: %w", namespace, name, explainForbidden(err, "list", "pods"))
	}
	if len(list.Items) == 0 {
		return "", fmt.Errorf("there is no pod %s/%s", namespace, name)
	}
	return list.Items[0].Spec.NodeName, nil
}

func (p *Pods) explain(r *resident) Explanation {
	e := Explanation{
		Namespace: r.pod.Namespace, Name: r.pod.Name, UID: r.pod.UID, ServiceAccount: r.pod.ServiceAccount,
		IPs: p.ipsOf(r), Since: r.since, Decision: DecisionNone,
	}
	step := func(mark Mark, about, fix, format string, args ...any) {
		e.Steps = append(e.Steps, Step{mark, about, fmt.Sprintf(format, args...), fix})
	}
	state := "is bound to node"
	if r.terminating {
		state = "is terminating on node"
	}
	step(OK, "pod", "", "the pod %s %s, phase %s", state, p.node, cmp.Or(string(r.phase), "unknown"))
	switch {
	case r.ended:
		e.Reason = ReasonEnded
		step(Note, "pod", "", "its containers have ended: its IP may be another pod's; what it was refused is in its Events: kubectl describe pod -n %s %s", r.pod.Namespace, r.pod.Name)
		return e
	case r.hostNetwork:
		e.Reason = ReasonHostNetwork
		step(Note, "pod", "take hostNetwork: true out of its template, or give it credentials in another way; the node's own role is what it has now",
			"it uses the node's network (hostNetwork): it has no IP of its own and is never served, to the kernel it is the node")
		return e
	}
	e.Decision, e.Reason = DecisionUnknown, ReasonIncomplete
	if r.account != nil {
		p.explainObject(step, "account", "service account "+r.accountName().String(), "serviceaccounts", r.account)
		p.explainObject(step, "namespace", "namespace "+r.pod.Namespace, "namespaces", r.namespace)
	}
	if c := r.caller; c != nil {
		p.explainDecision(&e, r, c, step)
	} else {
		step(Bad, "role", "", "not decided yet: %v", proxy.ErrIncomplete)
	}
	p.explainAddresses(&e, r, step)
	return e
}

type stepFunc func(mark Mark, about, fix, format string, args ...any)

func (p *Pods) explainObject(step stepFunc, about, what, resource string, u *used) {
	mark := OK
	if !u.known {
		mark = Bad
		if err := p.failures.of(resource, u.name); err != nil {
			step(mark, about, "", "%s: not known yet: %v", what, err)
			return
		}
	}
	step(mark, about, "", "%s: %s", what, u.describe())
}

func (p *Pods) explainDecision(e *Explanation, r *resident, c *proxy.Caller, step stepFunc) {
	switch {
	case c.Grant != nil:
		e.Decision, e.Reason, e.RoleARN, e.SessionName = DecisionGranted, "", c.Grant.Key.RoleARN, c.Grant.Key.SessionName
		key := c.Grant.Key
		e.Key, e.Prefetch = &key, !r.ownSource
		step(OK, "role", "", "it may have role %s, session name %s", e.RoleARN, e.SessionName)
		if r.ownSource {
			step(Note, "role", "take AWS_WEB_IDENTITY_TOKEN_FILE or AWS_CONTAINER_CREDENTIALS_FULL_URI, and the webhook that sets it, away from the pod if imdsgate is to serve it",
				"its containers name another source of credentials (IRSA or EKS Pod Identity), so its SDKs will not ask here; nothing is prefetched")
		}
		switch r.quiet {
		case "":
		case envProxy:
			step(Note, "role", "add "+endpointHost+" to NO_PROXY of its containers", "its containers set HTTP_PROXY and not NO_PROXY="+endpointHost+
				": SDKs that heed it ask the proxy for credentials")
		default:
			step(Note, "role", "take "+r.quiet+" out of the template that the pod is made of, if imdsgate is to serve it",
				"its containers set %s: SDKs that heed it do not ask here", r.quiet)
		}
	default:
		e.Decision = DecisionRefused
		mark := Bad
		switch {
		case c.Refusal.Kind == proxy.Denied:
			e.Reason = ReasonDenied
		case c.Refusal.Kind != proxy.NoRole:
			e.Reason = ReasonInvalid
		case c.Refusal.Misplaced:
			e.Reason = ReasonMisplaced
		default:
			e.Reason, mark = ReasonNoRole, Note
		}
		step(mark, "role", c.Refusal.Fix, "%s", c.Refusal.Text)
	}
	if r.conflict != "" {
		step(Note, "role", "", "%s", r.conflict)
	}
}

func (p *Pods) explainAddresses(e *Explanation, r *resident, step stepFunc) {
	if len(e.IPs) == 0 {
		step(Note, "address", "", "it has no IP yet")
	}
	for _, ip := range e.IPs {
		switch a, _ := p.holder(ip); {
		case errors.Is(a.err, proxy.ErrAmbiguousIP):
			step(Bad, "address", proxy.FixAmbiguousIP, "requests from %s are refused: %v: %s", ip, a.err, strings.Join(p.names(ip), ", "))
		case a.err != nil:
			step(Bad, "address", "", "requests from %s are refused: %v", ip, a.err)
		case a.caller.Pod.UID != r.pod.UID:
			step(Note, "address", "", "requests from %s are another pod's: this one is on its way out", ip)
		case a.source == sourceCNI:
			e.Source = a.source.String()
			step(OK, "address", "", "requests from %s are its own, since %s, by the node's CNI results", ip, a.caller.Since.UTC().Format(time.RFC3339))
		default:
			e.Source = cmp.Or(e.Source, a.source.String())
			step(OK, "address", "", "requests from %s are its own, by the API server", ip)
		}
	}
}

func (u *used) describe() string {
	switch {
	case !u.known:
		return "not known yet"
	case !u.present:
		return "does not exist"
	case len(u.annotations) == 0:
		return "no annotation that counts"
	}
	return "annotated " + strings.Join(slices.Sorted(maps.Keys(u.annotations)), ", ") // not the values: an external ID is nearly a secret
}

// of is what keeps the watch of one object from working; nil: nothing is known to.
func (f *failures) of(resource string, name types.NamespacedName) error {
	what := newFollowing(resource, name.Namespace, fields.OneTermEqualSelector(metav1.ObjectNameField, name.Name).String()).what
	f.mu.Lock()
	defer f.mu.Unlock()
	for w, err := range f.now {
		if w.what == what {
			return err
		}
	}
	return nil
}

// ambiguity reports to every pod that has an IP that nobody is served at it. It names no other pod: Events are for the owners
// of one namespace.
func (p *Pods) ambiguity(ip netip.Addr) []report {
	var reports []report
	for _, r := range p.byIP[ip] {
		if r.serving() && !r.terminating {
			reports = append(reports, report{r.pod, false, proxy.EventAmbiguousIP, fmt.Sprintf("%v (%s), so neither is given credentials; fix: %s",
				proxy.ErrAmbiguousIP, ip, proxy.FixAmbiguousIP)})
		}
	}
	return reports
}
