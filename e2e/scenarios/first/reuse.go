package first

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/e2e/scenarios/heir"
	"github.com/imdsgate/imdsgate/e2e/scenarios/sequence"
)

// Kinds of answers with credentials.
const (
	Own     = "its own role"
	Another = "ANOTHER POD'S ROLE"
	refused = "status 401 at the list" // Failure of a session token that is not valid
)

// Failure is the kind of an answer without credentials.
func Failure(r sequence.Result) string {
	if r.Code != 0 {
		return fmt.Sprintf("%s %d at the %s", r.Kind, r.Code, r.Step)
	}
	return fmt.Sprintf("%s at the %s", r.Kind, r.Step)
}

// Count counts what pods have written (heir.Result, one after the other). own says whether an access key is of a pod's role.
func (u *Reuse) Count(results io.Reader, addresses netip.Prefix, own func(pod, key string) (bool, error)) error {
	u.Failures, u.Tried = map[string]int{}, map[string]map[string]int{}
	var gaps []time.Duration
	kind := func(pod string, r sequence.Result) (string, error) {
		if r.Kind != sequence.OK {
			return Failure(r), nil
		}
		ok, err := own(pod, r.AccessKeyID)
		if !ok {
			u.Wrong++
			return Another, err
		}
		return Own, err
	}
	for found := json.NewDecoder(results); ; {
		var r heir.Result
		err := found.Decode(&r)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		u.Pods++
		if ip, err := netip.ParseAddr(r.IP); err != nil || !addresses.Contains(ip) {
			return fmt.Errorf("pod %s has the IP %s, which is not one of %s", r.Pod, r.IP, addresses)
		}
		k, err := kind(r.Pod, r.First)
		if err != nil {
			return err
		}
		if k == Own {
			u.Served++
		} else {
			u.Failures[k]++
		}
		if r.After != "" {
			u.Heirs++
			gaps = append(gaps, r.Gap)
		}
		for what, of := range r.Tried {
			if k, err = kind(r.Pod, of); err != nil {
				return err
			}
			if u.Tried[what] == nil {
				u.Tried[what] = map[string]int{}
			}
			u.Tried[what][k]++
		}
	}
	if len(gaps) > 0 {
		slices.Sort(gaps)
		u.Gap = gaps[len(gaps)/2]
	}
	return nil
}

// Check says what is wrong where every pod must get its own role, whatever it tries, and nobody may be refused what is its own.
func (u *Reuse) Check() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if u.Wrong > 0 {
		bad("%d answers with another pod's role", u.Wrong)
	}
	if u.Served != u.Pods {
		bad("%d of %d first instructions served; the others: %v", u.Served, u.Pods, u.Failures)
	}
	if u.Heirs < u.Pods/2 {
		bad("only %d of %d pods came after another one", u.Heirs, u.Pods)
	}
	for what, answers := range u.Tried {
		for kind, n := range answers {
			// An earlier holder's token is refused. A connection may be gone: where the daemon's keep-alive probe finds the new
			// holder before that has taken it over, its kernel says so.
			want := Own
			if what == heir.OldToken || what == heir.OldBoth {
				want = refused
			}
			gone := what != heir.OldToken && strings.HasPrefix(kind, sequence.Cut)
			if kind != want && kind != Another && !gone {
				bad("%s: %d times %s", what, n, kind)
			}
		}
	}
	if n := u.Tried[heir.OldConnection][Own]; 10*n < 9*u.Heirs {
		bad("only %d of %d inherited connections were answered", n, u.Heirs)
	}
	if n := u.Tried[heir.OldToken][refused]; n < u.Heirs {
		bad("only %d of %d tokens of earlier holders were refused", n, u.Heirs)
	}
	return errors.Join(errs...)
}

// Lines are the figures in words.
func (u *Reuse) Lines() []string {
	lines := []string{fmt.Sprintf("%s: %d pods on %d addresses, %d after another one (gap p50 %s); first instructions: %d served, others %v; answers with another pod's role: %d",
		u.Source, u.Pods, u.Addresses, u.Heirs, u.Gap.Round(time.Millisecond), u.Served, u.Failures, u.Wrong)}
	for _, what := range heir.Attempts {
		lines = append(lines, fmt.Sprintf("%s, %s: %v", u.Source, what, u.Tried[what]))
	}
	return lines
}
