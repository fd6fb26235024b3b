package clients

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// lag is how long after a pod's first question its answer becomes possible: within the daemon's hold
// of 450 ms.
const lag = 300 * time.Millisecond

// tooLate is what lag must not become on a machine that stands still for a moment: the hold would be over.
const tooLate = 400 * time.Millisecond

// situation is what the clients find when they start, and what happens between their two fetches.
type situation struct {
	name  string
	flags []string          // of the daemon
	env   []string          // of the clients
	who   func(client) bool // nil: all
	noIP  bool              // the API server does not know the pods' IPs yet
	// oneByOne keeps the clients from taking each other's processor: the answer has 150 ms beyond the lag.
	oneByOne bool
	// prepare makes a client's role and service account; nil: both as they should be.
	prepare func(context.Context, *stage, *run) error
	// before comes between the daemon's start and prepare, ready when all pods are there, asked lag after a client's first
	// request for the role list.
	before, ready func(context.Context, *stage) error
	asked         func(context.Context, *stage, *run) error
	// between comes after all first fetches; without it there is no second fetch.
	between func(context.Context, *stage) error

	ok    []func(client) bool // of each fetch
	check func(*stage, *run) error
}

// stage is a situation being played, on a node of its own with an AWS of its own.
type stage struct {
	t         *testing.T
	lab       *lab.Lab
	node      *lab.Node
	daemon    *lab.Daemon
	namespace string
	runs      []*run
}

// run is one client in one situation.
type run struct {
	client  client
	role    string // ARN
	pod     *lab.Pod
	release func() // lets its role's STS call go on

	process *process
	wire    *wire
	list    <-chan struct{} // its first request for the role list
	results []result
	seen    []exchange
	came    time.Time // when what it asked for became possible
	err     error     // how it died
}

// TestClients is the matrix of real clients and situations, against the daemon on a lab node.
func TestClients(t *testing.T) {
	argv := programs(t)
	l, err := lab.Start(labtest.Context(t), lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("remove the lab: %v", err)
		}
	})
	all := func(client) bool { return true }
	none := func(client) bool { return false }
	v2 := func(c client) bool { return !c.v1 }
	v6 := func(c client) bool { return c.v6 }
	type outcomes = []func(client) bool

	var results table
	for _, s := range []situation{
		{
			name: "healthy", env: []string{"CALLER_IDENTITY=1"}, ready: issued, between: nothing,
			ok: outcomes{all, all}, check: func(s *stage, r *run) error { return errors.Join(threeRequests(s, r), identified(s, r)) },
		},
		{
			name: "IMDSv2 only", flags: []string{"-imdsv1=false"}, env: []string{"AWS_EC2_METADATA_V1_DISABLED=true"},
			ok: outcomes{v2},
		},
		{
			name: "IPv6", env: []string{"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE=IPv6"}, who: v6,
			ok: outcomes{all},
		},
		{
			name: "no role, then one", prepare: without, between: annotate,
			ok: outcomes{none, all}, check: listAnswered("404"),
		},
		{
			name: "denied, then allowed", prepare: untrusted, between: trust,
			ok: outcomes{none, all}, check: listAnswered("403"),
		},
		{
			name: "not permitted, then so", before: forbid, between: permit,
			ok: outcomes{none, all}, check: listAnswered("403"),
		},
		{
			name: "IP unknown, then known", noIP: true, between: reportIPs,
			ok: outcomes{none, all}, check: listAnswered("503"),
		},
		{
			name: "killed, then restarted", ready: issuedThenKilled, between: restart,
			ok: outcomes{none, all},
		},
		{
			name: "STS down, then up", before: stsDown, between: stsUp,
			ok: outcomes{none, all}, check: listAnswered("503"),
		},
		{
			name: "STS down, cached", ready: issuedThenDown, between: nothing,
			ok: outcomes{all, all}, check: threeRequests,
		},
		{
			name: "restart", ready: issued, between: restart,
			ok: outcomes{all, all}, check: tokenKept,
		},
		{
			name: "IP 300 ms late", noIP: true, oneByOne: true, asked: reportIP,
			ok: outcomes{all}, check: listHeld,
		},
		{
			name: "STS 300 ms late", prepare: stalled, oneByOne: true, asked: goOn,
			ok: outcomes{all}, check: listHeld,
		},
	} {
		t.Run(s.name, func(t *testing.T) {
			start := time.Now()
			st := play(t, l, argv, s)
			for again := 0; again < 2 && st.late(); again++ {
				t.Log("what comes late came later than the hold: played again")
				st = play(t, l, argv, s)
			}
			results.add(s.name, time.Since(start), st.runs)
			for _, r := range st.runs {
				t.Run(r.client.name, func(t *testing.T) {
					if err := st.judge(s, r); err != nil {
						t.Error(err)
					}
					t.Logf("fetches: %+v\non the wire: %v", r.results, r.seen)
				})
			}
			labtest.Untouched(t, st.node, imds.Expected{NodeRole: true})
		})
	}
	text := results.String()
	t.Logf("\n%s", text)
	out := filepath.Join("..", "out")
	if err := errors.Join(os.MkdirAll(out, 0o755), os.WriteFile(filepath.Join(out, "clients.md"), []byte(text), 0o644)); err != nil {
		t.Error(err)
	}
}

// play runs every client through the situation.
func play(t *testing.T, l *lab.Lab, argv map[string][]string, s situation) *stage {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	node := labtest.Node(t, l, lab.NodeOptions{})
	st := &stage{t: t, lab: l, node: node, namespace: l.Unique("clients"), daemon: labtest.Daemon(t, node, s.flags...)}
	must := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	must("namespace", st.allow(ctx, "arn:aws:iam::*:role/clients/*"))
	if s.before != nil {
		must("before", s.before(ctx, st))
	}
	if s.prepare == nil {
		s.prepare = proper
	}
	for _, c := range clients {
		if s.who != nil && !s.who(c) {
			continue
		}
		r := &run{client: c, role: "arn:aws:iam::" + lab.Account + ":role/clients/" + c.name}
		must("prepare "+c.name, s.prepare(ctx, st, r))
		r.pod = labtest.Pod(t, node, lab.PodSpec{Namespace: st.namespace, Name: c.name, ServiceAccount: c.name, Pending: s.noIP})
		must("watch "+c.name, r.pod.Net.Do(func() (err error) {
			r.wire, err = tap()
			return err
		}))
		r.list = r.wire.when(exchange.list)
		st.runs = append(st.runs, r)
	}
	if s.ready != nil {
		must("ready", s.ready(ctx, st))
	}
	atATime := 4
	if s.oneByOne {
		atATime = 1
	}
	st.each(atATime, func(r *run) error { return r.first(ctx, st, s, argv[r.client.name]) })
	if s.between != nil {
		must("between", s.between(ctx, st))
		st.each(atATime, func(r *run) error { return r.keep(r.process.again()) })
	}
	st.each(atATime, func(r *run) error { return r.process.end() })
	for _, r := range st.runs {
		r.seen = r.wire.stop()
	}
	return st
}

// late says whether a client was let wait for longer than the situation says.
func (s *stage) late() bool {
	return slices.ContainsFunc(s.runs, func(r *run) bool {
		first := slices.IndexFunc(r.seen, exchange.list)
		return first >= 0 && r.came.Sub(r.seen[first].sent) > tooLate
	})
}

// each calls f for the clients that are alive and keeps its error as how they died.
func (s *stage) each(atATime int, f func(*run) error) {
	parallel(atATime, len(s.runs), func(i int) {
		if r := s.runs[i]; r.err == nil {
			r.err = f(r)
		}
	})
}

func (r *run) first(ctx context.Context, st *stage, s situation, argv []string) error {
	cmd := r.pod.Command(ctx, argv[0], argv[1:]...)
	cmd.Env = append(cmd.Env, s.env...)
	var err error
	if r.process, err = start(cmd, nil); err != nil {
		return err
	}
	if s.asked == nil {
		return r.keep(r.process.next())
	}
	fetched, event := make(chan struct{}), make(chan error, 1)
	go func() {
		select {
		case <-r.list:
			time.Sleep(lag) // this is the fault, not a wait for something
			err := s.asked(ctx, st, r)
			r.came = time.Now()
			event <- err
		case <-fetched:
			event <- errors.New("the client never asked for the role list")
		}
	}()
	err = r.keep(r.process.next())
	close(fetched)
	return errors.Join(err, <-event)
}

func (r *run) keep(res result, err error) error {
	if err == nil {
		r.results = append(r.results, res)
	}
	return err
}

// judge says what is wrong with a client's run.
func (s *stage) judge(want situation, r *run) error {
	if r.err != nil {
		return r.err
	}
	if len(r.results) != len(want.ok) {
		return fmt.Errorf("%d fetches, want %d", len(r.results), len(want.ok))
	}
	fetched := 0
	for i, res := range r.results {
		ok := want.ok[i](r.client)
		if err := expect(r.client, res, ok); err != nil {
			return fmt.Errorf("fetch %d: %w", i+1, err)
		}
		if !ok {
			continue
		}
		fetched++
		owner, known := s.node.AWS.Owner(res.AccessKeyID)
		if !known || owner.RoleARN != r.role {
			return fmt.Errorf("fetch %d: access key %s is of %+v, want one of %s", i+1, res.AccessKeyID, owner, r.role)
		}
	}
	if err := answered(r.seen, fetched); err != nil {
		return err
	}
	if want.check != nil {
		return want.check(s, r)
	}
	return nil
}

// Preparations.

func proper(ctx context.Context, s *stage, r *run) error {
	if _, err := s.node.Role("clients/" + r.client.name); err != nil {
		return err
	}
	return s.account(ctx, r, map[string]string{"eks.amazonaws.com/role-arn": r.role})
}

func without(ctx context.Context, s *stage, r *run) error {
	if _, err := s.node.Role("clients/" + r.client.name); err != nil {
		return err
	}
	return s.account(ctx, r, nil)
}

// untrusted makes a role that trusts somebody else.
func untrusted(ctx context.Context, s *stage, r *run) error {
	other := aws.Trust{AWS: "arn:aws:iam::" + lab.Account + ":role/clients/nobody"}
	if err := s.node.AWS.SetRole(aws.Role{ARN: r.role, Trust: []aws.Trust{other}}); err != nil {
		return err
	}
	return s.account(ctx, r, map[string]string{"eks.amazonaws.com/role-arn": r.role})
}

// stalled makes STS keep the role's call until the run's release.
func stalled(ctx context.Context, s *stage, r *run) error {
	r.release = s.node.AWS.Inject(aws.Fault{Operation: "AssumeRole", RoleARN: r.role, Delay: time.Minute})
	return proper(ctx, s, r)
}

// allow sets the roles that the namespace permits.
func (s *stage) allow(ctx context.Context, pattern string) error {
	return s.lab.Namespace(ctx, s.namespace, map[string]string{"iam.amazonaws.com/allowed-roles": `["` + pattern + `"]`})
}

func (s *stage) account(ctx context.Context, r *run, annotations map[string]string) error {
	return s.lab.ServiceAccount(ctx, s.namespace, r.client.name, annotations)
}

// Events.

func nothing(context.Context, *stage) error { return nil }

// issued waits until the present daemon has a session for every client's role.
func issued(ctx context.Context, s *stage) error {
	for _, r := range s.runs {
		if _, err := s.daemon.Log().Wait(ctx, "session issued", `"`+r.role+`"`); err != nil {
			return err
		}
	}
	return nil
}

func stsDown(_ context.Context, s *stage) error { return s.node.AWS.Kill() }

func stsUp(ctx context.Context, s *stage) error {
	return errors.Join(s.node.AWS.Start(), issued(ctx, s))
}

func issuedThenDown(ctx context.Context, s *stage) error {
	return errors.Join(issued(ctx, s), stsDown(ctx, s))
}

func issuedThenKilled(ctx context.Context, s *stage) error {
	err := issued(ctx, s)
	s.daemon.Kill()
	return err
}

func forbid(ctx context.Context, s *stage) error { return s.allow(ctx, "arn:aws:iam::*:role/others/*") }

func permit(ctx context.Context, s *stage) error {
	return errors.Join(s.allow(ctx, "arn:aws:iam::*:role/clients/*"), issued(ctx, s))
}

func annotate(ctx context.Context, s *stage) error {
	for _, r := range s.runs {
		if err := s.account(ctx, r, map[string]string{"eks.amazonaws.com/role-arn": r.role}); err != nil {
			return err
		}
	}
	return issued(ctx, s)
}

// trust corrects the roles, and touches the service accounts: a change of theirs is tried at once.
func trust(ctx context.Context, s *stage) error {
	for _, r := range s.runs {
		if _, err := s.node.Role("clients/" + r.client.name); err != nil {
			return err
		}
		if err := s.account(ctx, r, map[string]string{"eks.amazonaws.com/role-arn": r.role, "corrected": "yes"}); err != nil {
			return err
		}
	}
	return issued(ctx, s)
}

func restart(ctx context.Context, s *stage) error {
	s.daemon.Kill()
	s.daemon = labtest.Launch(s.t, s.node, s.daemon.Options)
	return s.daemon.WaitReady(ctx)
}

func reportIP(ctx context.Context, _ *stage, r *run) error { return r.pod.SetRunning(ctx) }

func reportIPs(ctx context.Context, s *stage) error {
	for _, r := range s.runs {
		if err := r.pod.SetRunning(ctx); err != nil {
			return err
		}
	}
	return nil
}

func goOn(_ context.Context, _ *stage, r *run) error {
	r.release()
	return nil
}

// Checks beyond the outcome.

func threeRequests(_ *stage, r *run) error {
	if n := len(r.seen); n > 3*len(r.results) {
		return fmt.Errorf("%d requests for %d fetches, want at most 3 each", n, len(r.results))
	}
	return nil
}

// identified checks that credentials were good for a call of the client's own, where it makes one.
func identified(s *stage, r *run) error {
	if !r.client.calls {
		return nil
	}
	for i, res := range r.results {
		if owner, _ := s.node.AWS.Owner(res.AccessKeyID); res.ARN == "" || res.ARN != owner.ARN {
			return fmt.Errorf("fetch %d: STS calls the client %q, want %s", i+1, res.ARN, owner.ARN)
		}
	}
	return nil
}

// listAnswered checks that the first role list had the status: this is the situation that was meant.
func listAnswered(status string) func(*stage, *run) error {
	return func(_ *stage, r *run) error {
		for _, e := range r.seen {
			if e.list() {
				if e.status != status {
					return fmt.Errorf("the role list was answered with %s, want %s", e.status, status)
				}
				return nil
			}
		}
		return errors.New("the client never asked for the role list")
	}
}

func listHeld(s *stage, r *run) error {
	for _, e := range r.seen {
		if e.list() && e.after < lag*9/10 {
			return fmt.Errorf("the role list was answered after %v, want it held for %v", e.after, lag)
		}
	}
	return listAnswered("200")(s, r)
}

// tokenKept checks that a session token outlives the daemon: some clients keep theirs for six hours.
func tokenKept(_ *stage, r *run) error {
	tokens := 0
	for _, e := range r.seen {
		if e.status == "401" {
			return errors.New("a session token was refused after the restart")
		}
		if e.method == "PUT" {
			tokens++
		}
	}
	if r.client.keepsToken && tokens != 1 {
		return fmt.Errorf("%d session tokens, want 1: this client keeps its first", tokens)
	}
	return nil
}

// table is what is printed at the end, for the documentation.
type table struct {
	situations []string
	cells      map[string]map[string]string // by client, situation
}

func (t *table) add(situation string, took time.Duration, runs []*run) {
	if t.cells == nil {
		t.cells = map[string]map[string]string{}
	}
	t.situations = append(t.situations, situation)
	for _, c := range clients {
		if t.cells[c.name] == nil {
			t.cells[c.name] = map[string]string{}
		}
		t.cells[c.name][situation] = "not possible"
	}
	for _, r := range runs {
		t.cells[r.client.name][situation] = r.String()
	}
	if t.cells["(all)"] == nil {
		t.cells["(all)"] = map[string]string{}
	}
	t.cells["(all)"][situation] = fmt.Sprintf("%.1f s", took.Seconds())
}

// String is the run as a table shows it.
func (r *run) String() string {
	var cell []string
	for _, res := range r.results {
		word := "none"
		if res.OK {
			word = "ok"
		}
		cell = append(cell, fmt.Sprintf("%s %.2f s", word, res.Seconds))
	}
	switch {
	case aborted(r.err):
		cell = append(cell, "ABORT")
	case hung(r.err):
		cell = append(cell, "HANG")
	case r.err != nil:
		cell = append(cell, "DIED")
	}
	return strings.Join(cell, ", ")
}

func (t *table) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "| client | %s |\n|%s\n", strings.Join(t.situations, " | "), strings.Repeat("---|", len(t.situations)+1))
	names := make([]string, 0, len(clients)+1)
	for _, c := range clients {
		names = append(names, c.name)
	}
	for _, name := range append(names, "(all)") {
		fmt.Fprintf(&b, "| %s |", name)
		for _, s := range t.situations {
			fmt.Fprintf(&b, " %s |", t.cells[name][s])
		}
		b.WriteString("\n")
	}
	return b.String()
}
