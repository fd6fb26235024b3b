package pods

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/proxy"
)

// Explanation is what a person needs to know about one pod's answer. It holds no secret.
type Explanation struct {
	Namespace      string       `json:"namespace"`
	Name           string       `json:"name"`
	UID            string       `json:"uid"`
	ServiceAccount string       `json:"service_account"`
	IPs            []netip.Addr `json:"ips"`
	Since          time.Time    `json:"since,omitzero"`
	Decision       string       `json:"decision"` // granted, refused, unknown, or none: it never asks us
	RoleARN        string       `json:"role_arn,omitempty"`
	SessionName    string       `json:"session_name,omitempty"`
	Prefetch       bool         `json:"prefetch"`
	Steps          []string     `json:"steps"` // how it came to that, in order
}

// Decisions of an Explanation.
const (
	DecisionGranted = "granted"
	DecisionRefused = "refused"
	DecisionUnknown = "unknown"
	DecisionNone    = "none"
)

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

func (p *Pods) explain(r *resident) Explanation {
	e := Explanation{
		Namespace: r.pod.Namespace, Name: r.pod.Name, UID: r.pod.UID, ServiceAccount: r.pod.ServiceAccount,
		IPs: p.ipsOf(r), Since: r.since, Decision: DecisionNone,
	}
	step := func(format string, args ...any) { e.Steps = append(e.Steps, fmt.Sprintf(format, args...)) }

	state := "is bound to node"
	if r.terminating {
		state = "is terminating on node"
	}
	step("the pod %s %s, phase %s", state, p.node, cmp.Or(string(r.phase), "unknown"))
	switch {
	case r.ended:
		step("its containers have ended: its IP may be another pod's")
		return e
	case r.hostNetwork:
		step("it uses the node's network (hostNetwork): it has no IP of its own and is never served")
		return e
	}
	e.Decision = DecisionUnknown
	if r.account != nil {
		step("service account %s: %s", r.accountName(), r.account.describe())
		step("namespace %s: %s", r.pod.Namespace, r.namespace.describe())
	}
	if c := r.caller; c != nil {
		if c.Grant != nil {
			e.Decision, e.RoleARN, e.SessionName = DecisionGranted, c.Grant.Key.RoleARN, c.Grant.Key.SessionName
			e.Prefetch = !r.ownSource
			step("it may have role %s, session name %s", e.RoleARN, e.SessionName)
			if r.ownSource {
				step("its containers name another source of credentials, so its SDKs will not ask; nothing is prefetched")
			}
		} else {
			e.Decision = DecisionRefused
			step("refused: %s", c.Refusal.Text)
		}
		if r.conflict != "" {
			step("note: %s", r.conflict)
		}
	} else {
		step("not decided yet: %v", proxy.ErrIncomplete)
	}
	if len(e.IPs) == 0 {
		step("it has no IP yet")
	}
	for _, ip := range e.IPs {
		switch a, _ := p.holder(ip); {
		case a.err != nil:
			step("requests from %s are refused: %v", ip, a.err)
		case a.caller.Pod.UID != r.pod.UID:
			step("requests from %s are another pod's: this one is on its way out", ip)
		case a.source == sourceCNI:
			step("requests from %s are its own, since %s, by the node's CNI results", ip, a.caller.Since.UTC().Format(time.RFC3339))
		default:
			step("requests from %s are its own", ip)
		}
	}
	return e
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
