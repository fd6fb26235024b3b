package proxy

import (
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// maxDenials bounds what is remembered of refused requests.
const maxDenials = 128

// Denial is what is remembered of the requests of one pod that were refused for one reason, for people who ask why.
type Denial struct {
	Last      time.Time  `json:"last"`
	Count     int        `json:"count"`
	Source    netip.Addr `json:"source"`
	Namespace string     `json:"namespace,omitempty"` // empty: the pod was not known
	Pod       string     `json:"pod,omitempty"`
	Code      int        `json:"code"`   // of the answer
	Reason    string     `json:"reason"` // as in the metrics
	Text      string     `json:"text"`   // of the last answer
	Path      string     `json:"path"`   // of the last request, printable and cut
}

// denials remembers the last refused requests. One pod takes at most one place for each reason, so none that asks in a loop
// hides the others.
type denials struct {
	mu  sync.Mutex
	all []Denial
}

func (d *denials) add(latest Denial) {
	d.mu.Lock()
	defer d.mu.Unlock()
	at, oldest := -1, 0
	for i := range d.all {
		old := &d.all[i]
		if old.Source == latest.Source && old.Reason == latest.Reason && old.Namespace == latest.Namespace && old.Pod == latest.Pod {
			at = i
			break
		}
		if old.Last.Before(d.all[oldest].Last) {
			oldest = i
		}
	}
	latest.Count = 1
	switch {
	case at >= 0:
		latest.Count += d.all[at].Count
		d.all[at] = latest
	case len(d.all) < maxDenials:
		d.all = append(d.all, latest)
	default:
		d.all[oldest] = latest
	}
}

// Denials are the pods whose requests were refused lately and why, the latest first: at most 128, one for each pod and reason.
func (s *Server) Denials() []Denial {
	s.denials.mu.Lock()
	all := slices.Clone(s.denials.all)
	s.denials.mu.Unlock()
	slices.SortFunc(all, func(a, b Denial) int { return b.Last.Compare(a.Last) })
	return all
}

// remember notes a refused request.
func (q request) remember(c *Caller, code int, reason, text string) {
	d := Denial{Last: q.start, Source: q.ip, Code: code, Reason: reason, Text: text, Path: shownPath(q.r.RequestURI)}
	if c != nil {
		d.Namespace, d.Pod = c.Pod.Namespace, c.Pod.Name
	}
	q.s.denials.add(d)
}

// shownPath is a request target without its query, for people.
func shownPath(target string) string {
	path, _, _ := strings.Cut(target, "?")
	return strings.Clone(oneLineOf(path[:min(len(path), 512)], 96))
}
