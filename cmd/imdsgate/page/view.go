package page

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/cache"
	"github.com/imdsgate/imdsgate/proxy"
	"github.com/imdsgate/imdsgate/proxy/pods"
)

// View is everything that the page shows.
type View struct {
	Node     string         `json:"node"`
	Version  string         `json:"version"`
	Issuer   string         `json:"issuer"`
	Now      time.Time      `json:"now"`
	Started  time.Time      `json:"started"`
	NotReady []string       `json:"not_ready,omitempty"` // what is missing; empty: ready
	Troubles []string       `json:"troubles,omitempty"`  // with the API server
	Rules    []Finding      `json:"rules"`
	Pods     []Pod          `json:"pods"`
	Denials  []proxy.Denial `json:"denials"` // the latest first
	Flags    []Flag         `json:"flags"`
}

// Finding is one about the rules that bring pods here and keep them from the real endpoint.
type Finding struct {
	Severity string `json:"severity"` // info, warning or error
	About    string `json:"about"`
	Text     string `json:"text"`
	Fix      string `json:"fix,omitempty"`
}

// Flag is a setting in effect.
type Flag struct {
	Name    string `json:"name"`
	Value   string `json:"value"`
	Default bool   `json:"default"` // nobody set it
}

// Pod is one pod with what it gets.
type Pod struct {
	pods.Explanation
	Status      Status       `json:"status"`
	Problem     string       `json:"problem,omitempty"` // what stands between it and credentials
	Fix         string       `json:"fix,omitempty"`
	Credentials *Credentials `json:"credentials,omitempty"`
}

// Credentials is the state of a pod's credentials. Times are zero while there are none.
type Credentials struct {
	State       cache.State `json:"state"`
	Issued      time.Time   `json:"issued,omitzero"`
	Expires     time.Time   `json:"expires,omitzero"`
	NextRefresh time.Time   `json:"next_refresh,omitzero"` // or the next try
	Error       string      `json:"error,omitempty"`       // of the last try
	Fix         string      `json:"fix,omitempty"`         // what to do about it
}

// Status is a pod's state in a word.
type Status string

// The states.
const (
	Failing   Status = "failing"       // it may have the role, but STS gives no credentials for it
	Refused   Status = "refused"       // it may not have a role
	Stale     Status = "refresh fails" // it still has credentials
	Waiting   Status = "waiting"
	Served    Status = "served"
	NoRole    Status = "no role"
	Elsewhere Status = "elsewhere" // its credentials come from somewhere else
	HostNet   Status = "host network"
	Ended     Status = "ended"
)

// rank is a state's place on the page: first what somebody should look at.
func (s Status) rank() int {
	return slices.Index([]Status{Failing, Refused, Stale, Waiting, Served, NoRole, Elsewhere, HostNet, Ended}, s)
}

// Attention says that somebody should look.
func (s Status) Attention() bool { return s == Failing || s == Refused || s == Stale }

// NewPod joins what is known of a pod with the state of its credentials; nil: nobody has asked for any.
func NewPod(e pods.Explanation, entry *cache.Entry, now time.Time) Pod {
	p := Pod{Explanation: e}
	if e.Key != nil {
		p.addCredentials(entry, now)
	}
	if s, ok := p.Explanation.Problem(); ok {
		p.Problem, p.Fix = s.Text, s.Fix
	} else if i := slices.IndexFunc(p.Steps, func(s pods.Step) bool { return s.Fix != "" }); i >= 0 {
		p.Fix = p.Steps[i].Fix
	}
	p.Status = p.status()
	return p
}

func (p *Pod) status() Status {
	problem := p.Problem != ""
	switch {
	case p.Reason == pods.ReasonHostNetwork:
		return HostNet
	case p.Reason == pods.ReasonEnded:
		return Ended
	case p.Decision == pods.DecisionUnknown:
		return Waiting
	case p.Reason == pods.ReasonNoRole && !problem:
		return NoRole
	case p.Decision == pods.DecisionRefused:
		return Refused
	case p.Credentials == nil && problem: // nobody is served at its address
		return Refused
	case !p.Prefetch && (p.Credentials == nil || p.Credentials.State == cache.Ready): // another pod's of its account
		return Elsewhere
	case p.Credentials == nil || p.Credentials.State == cache.Pending:
		return Waiting
	case p.Credentials.State == cache.Failed:
		return Failing
	case p.Credentials.Error != "":
		return Stale
	case problem:
		return Refused
	case len(p.IPs) == 0: // nobody is known to ask for it
		return Waiting
	}
	return Served
}

// addCredentials says how the last step went.
func (p *Pod) addCredentials(entry *cache.Entry, now time.Time) {
	step := func(mark pods.Mark, fix, format string, args ...any) {
		p.Steps = append(slices.Clip(p.Steps), pods.Step{Mark: mark, About: "credentials", Text: fmt.Sprintf(format, args...), Fix: fix})
	}
	if entry == nil {
		if p.Prefetch {
			step(pods.Note, "", "none yet: STS is asked as soon as its turn comes")
		}
		return
	}
	p.Credentials = &Credentials{State: entry.State, Issued: entry.Issued, Expires: entry.Expires, NextRefresh: entry.NextIssue}
	var text, fix string
	if entry.Err != nil {
		text, fix = Words(entry.Err)
		p.Credentials.Error, p.Credentials.Fix = text, fix
	}
	left, length := entry.Expires.Sub(now), entry.Expires.Sub(entry.Issued)
	switch {
	case entry.State == cache.Ready && text != "":
		step(pods.Bad, fix, "valid for %s more, but the last refresh failed: %s", Span(left), text)
	case entry.State == cache.Ready && entry.Issued.IsZero():
		length = left
		step(pods.OK, "", "STS gives credentials for the role, valid for %s", Span(left))
	case entry.State == cache.Ready && entry.NextIssue.IsZero():
		step(pods.OK, "", "issued %s ago, valid for %s more, being refreshed", Span(now.Sub(entry.Issued)), Span(left))
	case entry.State == cache.Ready:
		step(pods.OK, "", "issued %s ago, valid for %s more, refreshed in %s", Span(now.Sub(entry.Issued)), Span(left), Span(entry.NextIssue.Sub(now)))
	case text != "":
		step(pods.Bad, fix, "%s", text)
	default:
		step(pods.Note, "", "none yet: STS is being asked")
	}
	if wanted := p.Key.Duration; entry.State == cache.Ready && length > 0 && length < wanted-5*time.Minute {
		step(pods.Note, "raise the role's MaxSessionDuration, or ask for less; assumed with a role's credentials, as a node's are, sessions last 1h at most (role chaining)",
			"STS gives sessions of %s, not of the %s that were asked for", Span(length.Round(time.Minute)), Span(wanted))
	}
}

// Words are the text of an error of the issuer and what to do about it.
func Words(err error) (text, fix string) {
	if issue, ok := errors.AsType[*cache.IssueError](err); ok {
		return issue.Err.Error(), issue.Hint
	}
	return err.Error(), ""
}

// Sort puts first what somebody should look at.
func Sort(list []Pod) {
	slices.SortStableFunc(list, func(a, b Pod) int {
		return cmp.Or(cmp.Compare(a.Status.rank(), b.Status.rank()),
			strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
}

// matches says that each word of a query is in what the page shows of the pod.
func (p *Pod) matches(query string) bool {
	var b strings.Builder
	for _, s := range []string{p.Namespace + "/" + p.Name, p.Namespace + "/" + p.ServiceAccount, p.RoleARN, string(p.Status), p.Reason, p.Problem} {
		b.WriteString(strings.ToLower(s))
		b.WriteByte('\n')
	}
	for _, ip := range p.IPs {
		b.WriteString(ip.String())
		b.WriteByte('\n')
	}
	all := b.String()
	for word := range strings.FieldsSeq(strings.ToLower(query)) {
		if !strings.Contains(all, word) {
			return false
		}
	}
	return true
}

// Span is a length of time for people: its one or two largest units.
func Span(d time.Duration) string {
	if d < 0 {
		return "0s"
	}
	const day = 24 * time.Hour
	two := func(n int, unit string, m int, small string) string {
		if m == 0 {
			return fmt.Sprintf("%d%s", n, unit)
		}
		return fmt.Sprintf("%d%s %d%s", n, unit, m, small)
	}
	switch d = d.Round(time.Second); {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 10*time.Minute:
		return two(int(d/time.Minute), "m", int(d%time.Minute/time.Second), "s")
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d/time.Minute))
	case d < day:
		return two(int(d/time.Hour), "h", int(d%time.Hour/time.Minute), "m")
	}
	return two(int(d/day), "d", int(d%day/time.Hour), "h")
}
