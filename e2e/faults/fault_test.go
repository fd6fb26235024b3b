package faults

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/cluster/control"
	"github.com/imdsgate/imdsgate/e2e/clustertest"
	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/scenarios/sequence"
)

// fault is one test: from a quiet cluster to a quiet cluster.
type fault struct {
	*testing.T
	*suite
	ctx   context.Context
	row   row
	warm  []*clustertest.Steady // pods that the daemon has credentials for
	cold  []*clustertest.Steady // pods that were new, or whose sessions ended, while the fault lasted
	late  []*clustertest.Steady // pods that had no role
	from  map[*clustertest.Steady]int
	mark  clustertest.Mark
	at    time.Time // when it struck
	since time.Time // what the time until all is whole counts from
	whole time.Time
}

// fault begins the fault of this name; nodes are those whose pods may notice.
func (s *suite) fault(t *testing.T, name string, limit time.Duration, nodes []int, lasts ...any) *fault {
	t.Helper()
	i := slices.IndexFunc(catalogue, func(e entry) bool { return e.name == name })
	if i < 0 {
		t.Fatalf("%q is not in the catalogue", name)
	}
	s.needs(t, catalogue[i].long)
	// Not the test's: that one ends before what is to be cleaned up.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), limit)
	t.Cleanup(cancel)
	how := catalogue[i].how
	if len(lasts) > 0 {
		how = fmt.Sprintf(how, lasts...)
	}
	f := &fault{
		T: t, suite: s, ctx: ctx, warm: slices.Clone(s.loads), from: map[*clustertest.Steady]int{},
		row: row{Fault: name, How: how, Nodes: nodes, Date: s.report.Date, Answers: map[string]int{}, Since: "it began"},
	}
	f.since = time.Now().Add(-steadyFor)
	f.quiet()
	var err error
	f.mark, err = f.Mark(ctx)
	f.must(err)
	for _, l := range f.warm {
		f.from[l] = len(f.results(l))
	}
	f.at, f.since, f.whole = time.Time{}, time.Time{}, time.Time{}
	return f
}

// needs leaves a test to the long run.
func (s *suite) needs(t *testing.T, long bool) {
	if long && !s.long {
		t.Skip("left to make test-faults, which sets FAULTS=long")
	}
}

func (f *fault) must(err error) {
	f.Helper()
	if err != nil {
		f.Fatal(err)
	}
}

func (f *fault) results(l *clustertest.Steady) []sequence.Result {
	f.Helper()
	r, err := l.Results()
	f.must(err)
	return r
}

// wait asks again and again until right.
func (f *fault) wait(what string, right func() error) {
	f.Helper()
	for {
		err := right()
		if err == nil {
			return
		}
		if pause(f.ctx, 100*time.Millisecond) != nil {
			f.Fatalf("%s: not in time: %v", what, err)
		}
	}
}

// lasts lets time pass: a fault that lasts.
func (f *fault) lasts(d time.Duration) {
	f.Helper()
	f.must(pause(f.ctx, d))
}

// onNode runs a shell command in the node and returns its output.
func (f *fault) onNode(node int, command string) string {
	f.Helper()
	out, err := f.Node(node).Run(f.ctx, "sh", "-c", command)
	f.must(err)
	return strings.TrimSpace(out)
}

// strikes runs the command that is the fault, in a node.
func (f *fault) strikes(node int, command string) {
	f.Helper()
	at := seconds64(f.T, strings.Split(f.onNode(node, "date +%s.%N; "+command), "\n")[0])
	if f.at.IsZero() {
		f.at, f.since = at, at
	}
}

func seconds64(t *testing.T, text string) time.Time {
	t.Helper()
	whole, fraction, _ := strings.Cut(text, ".")
	s, err := strconv.ParseInt(whole, 10, 64)
	n, err2 := strconv.ParseInt(fraction, 10, 64)
	if err != nil || err2 != nil {
		t.Fatalf("%q is no time", text)
	}
	return time.Unix(s, n)
}

// struck says that the fault begins now.
func (f *fault) struck() { f.at, f.since = time.Now(), time.Now() }

// over says that a fault that lasted ends now.
func (f *fault) over() { f.since, f.row.Since = time.Now(), "its end" }

// wholeAt says that something was not whole before.
func (f *fault) wholeAt(t time.Time) {
	if t.After(f.whole) {
		f.whole = t
	}
}

func (f *fault) note(format string, args ...any) {
	f.row.Notes = append(f.row.Notes, fmt.Sprintf(format, args...))
}

// rules are what a node has of ours, of the routing rules and in the first places of the parents of our chains.
func rules(iptables string) string {
	return fmt.Sprintf(`for t in nat filter; do %[1]s-save -t $t | grep IMDSGATE | grep -v '^:'; done
%[1]s -t nat -S PREROUTING | sed -n 2p; %[1]s -S INPUT | sed -n 2p; ip -4 rule; ip -6 rule`, iptables)
}

// rulesOf returns them, all in place and in front: after a flush kubelet and kube-proxy put theirs first, once in a minute.
func (f *fault) rulesOf(node int, iptables string) (now string) {
	f.Helper()
	f.wait(fmt.Sprintf("the rules of node %d", node), func() error {
		now = f.onNode(node, rules(iptables))
		for _, want := range []string{"-d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination", "to 169.254.169.254 unreachable", "to fd00:ec2::254 unreachable"} {
			if !strings.Contains(now, want) {
				return fmt.Errorf("no %q in\n%s", want, now)
			}
		}
		// The first rules are shown once more.
		for _, parent := range []string{"PREROUTING", "INPUT"} {
			if n := strings.Count(now, "-A "+parent+" "); n != 2 {
				return fmt.Errorf("%d rules of %s in\n%s", n, parent, now)
			}
			for line := range strings.Lines(now) {
				if strings.HasPrefix(line, "-A "+parent+" ") && !strings.Contains(line, "IMDSGATE") {
					return fmt.Errorf("%sbefore ours in\n%s", line, now)
				}
			}
		}
		return nil
	})
	return now
}

// restored waits until a node's rules are again what they were.
func (f *fault) restored(node int, iptables, before string) {
	f.Helper()
	const until = `until [ "$(%s)" = "$1" ]; do sleep 0.05; done; date +%%s.%%N`
	out, err := f.Node(node).Run(f.ctx, "sh", "-c", fmt.Sprintf(until, rules(iptables)), "-", before)
	if err != nil {
		f.Fatalf("the rules of node %d are not what they were: %v: before\n%s\nnow\n%s", node, err, before, f.onNodeNow(node, rules(iptables)))
	}
	f.wholeAt(seconds64(f.T, strings.TrimSpace(out)))
}

// onNodeNow is onNode when the fault's own time is over.
func (f *fault) onNodeNow(node int, command string) string {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(f.ctx), 10*time.Second)
	defer cancel()
	out, err := f.Node(node).Run(ctx, "sh", "-c", command)
	if err != nil {
		return err.Error()
	}
	return out
}

// newPod makes a pod with a role of its own while the fault lasts, or after it; it goes with the test.
func (f *fault) newPod(node int) *clustertest.Steady {
	f.Helper()
	name := fmt.Sprintf("new%d-%d", node, time.Now().UnixMilli())
	l, err := f.load(f.ctx, name, node)
	f.must(err)
	f.Cleanup(func() { f.remove(l) })
	return l
}

func (f *fault) remove(l *clustertest.Steady) {
	f.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(f.ctx), 30*time.Second)
	defer cancel()
	if _, err := f.Kubectl(ctx, "delete", "pod", "-n", l.Namespace, l.Name, "--wait=false"); err != nil {
		f.Error(err)
	}
}

// served waits until a pod has credentials and returns when that was.
func (f *fault) served(l *clustertest.Steady, after time.Time) (at time.Time) {
	f.Helper()
	f.wait("pod "+l.Name+" is served", func() error {
		results := f.results(l)
		for _, r := range results {
			if r.Kind == sequence.OK && r.At.After(after) {
				at = r.At.Add(r.Took)
				return nil
			}
		}
		if len(results) == 0 {
			return fmt.Errorf("it has not asked")
		}
		return fmt.Errorf("it is answered %s", results[len(results)-1].Brief())
	})
	return at
}

// steadyFor is how long all must be well to count as well: a sequence may take 3 s to fail, as its requests have a second each.
const steadyFor = 3 * time.Second

// quiet waits until every warm pod is served again and was for a while, and notes since when.
func (f *fault) quiet() {
	f.Helper()
	for _, l := range f.warm {
		f.wait("pod "+l.Name+" is served again", func() error {
			var failed, healed time.Time
			results := f.results(l)[f.from[l]:]
			for _, r := range results {
				if r.Kind != sequence.OK && r.At.After(failed) {
					failed = r.At
				}
			}
			for _, r := range results {
				if end := r.At.Add(r.Took); r.Kind == sequence.OK && r.At.After(failed) && !r.At.Before(f.since) && (healed.IsZero() || end.Before(healed)) {
					healed = end
				}
			}
			if healed.IsZero() || time.Since(healed) < steadyFor {
				if len(results) == 0 {
					return fmt.Errorf("it asks no more")
				}
				return fmt.Errorf("the last answer is %s", results[len(results)-1].Brief())
			}
			if !failed.IsZero() {
				f.wholeAt(healed)
			}
			return nil
		})
	}
}

// expect says what pods may see of a fault.
type expect struct {
	// why requests may fail for which the daemon has an answer; empty: none may
	why   string
	kinds []string // with why: how
	// whole is the longest time until everything is as before.
	whole time.Duration
}

var (
	closed    = []string{sequence.Refused, sequence.Timeout, sequence.Cut} // by the guard, in whichever phase it catches a connection
	daemonOff = []string{sequence.Refused, sequence.Timeout, sequence.Cut, "503"}
)

func answer(r sequence.Result) string {
	if r.Kind == sequence.Status {
		return strconv.Itoa(r.Code)
	}
	return r.Kind
}

// done judges what pods saw, and writes the row.
func (f *fault) done(e expect) {
	f.Helper()
	f.quiet()
	f.wholeAt(f.since)
	owners := map[string]control.Owner{}
	for _, l := range f.warm {
		last := f.at
		for _, r := range f.results(l)[f.from[l]:] {
			end := r.At.Add(r.Took)
			if end.Before(f.at) {
				continue
			}
			touched := slices.Contains(f.row.Nodes, l.Node)
			if touched {
				f.row.Sequences++
				f.row.Answers[answer(r)]++
			}
			if r.Kind == sequence.OK {
				f.own(owners, l, r)
				f.row.LongestGap = max(f.row.LongestGap, end.Sub(last).Seconds())
				last = end
				continue
			}
			if e.why != "" && touched && slices.Contains(e.kinds, answer(r)) && !r.At.After(f.whole) {
				f.row.Failed++
				continue
			}
			if f.row.Unexplained++; f.row.Unexplained <= 5 {
				f.Errorf("%s, which the daemon had credentials for, failed %.3f s after the fault began: %s", l.Name, r.At.Sub(f.at).Seconds(), r.Brief())
			}
		}
	}
	for _, l := range slices.Concat(f.cold, f.late) {
		for _, r := range f.results(l)[f.from[l]:] {
			switch {
			case r.Kind == sequence.OK:
				f.own(owners, l, r)
			case answer(r) == "404" && slices.Contains(f.late, l):
			case r.Kind == sequence.Status && r.Code == 503:
			case e.why != "" && slices.Contains(e.kinds, answer(r)) && !r.At.After(f.whole):
			default:
				f.row.Unexplained++
				f.Errorf("the new pod %s is answered %s", l.Name, r.Brief())
			}
		}
	}
	if f.row.Failed > 0 {
		f.row.Why = e.why
	}
	if f.row.Node+f.row.Foreign+f.row.Expired > 0 {
		f.Errorf("WRONG CREDENTIALS: %d of the node, %d of others, %d expired", f.row.Node, f.row.Foreign, f.row.Expired)
	}
	f.mark.AssertUntouched(f.T, imds.Expected{NodeRole: true})
	f.row.Whole = f.whole.Sub(f.since).Seconds()
	if whole := f.whole.Sub(f.since); whole > e.whole {
		f.Errorf("whole again after %s, not within %s", whole.Round(10*time.Millisecond), e.whole)
	}
	f.Logf("%+v", f.row)
	if !f.Failed() {
		f.report.add(f.row)
	}
}

// own counts credentials that are not the pod's own, or that are served within a minute of their end.
func (f *fault) own(owners map[string]control.Owner, l *clustertest.Steady, r sequence.Result) {
	f.Helper()
	o, ok := owners[r.AccessKeyID]
	if !ok {
		var err error
		if o, err = f.Fabric.Owner(f.ctx, r.AccessKeyID); err != nil {
			f.Error(err)
		}
		owners[r.AccessKeyID] = o
	}
	switch {
	case o.Node || o.NodeIndex != 0:
		f.row.Node++
	case o.RoleARN != l.Role:
		f.row.Foreign++
	case r.At.Add(r.Took).After(o.Expires.Add(-59 * time.Second)): // expirations are whole seconds
		f.row.Expired++
	}
}
