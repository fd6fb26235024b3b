package e2e_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// hold is the default of -identify-timeout.
const hold = 450 * time.Millisecond

// A pod's first request comes before anybody knows its IP, and is answered all the same.
func TestLabFirstRequest(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	labtest.Daemon(t, n, "-issuer", "web-identity")
	shop := shared.Unique("shop")
	role := serviceAccount(t, n, shop, "cart", "cart")
	for attempt := 1; ; attempt++ { // a busy machine may need the rest of the hold for the report
		p := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart", Pending: true})
		reported := make(chan error, 1)
		start := time.Now()
		time.AfterFunc(300*time.Millisecond, func() { reported <- p.SetRunning(ctx) })
		status, body := get(t, p, roleList)
		elapsed := time.Since(start)
		if err := <-reported; err != nil {
			t.Fatal(err)
		}
		if status == 503 && elapsed >= hold && attempt < 3 {
			continue
		}
		if status != 200 || body != "cart" {
			t.Errorf("the first request is answered %d %s after %v", status, body, elapsed)
		}
		if elapsed < 290*time.Millisecond {
			t.Errorf("it was answered after %v, before the pod had an IP", elapsed)
		}
		served(t, n, p, role)
		break
	}

	// One whose IP never appears is told to come again, within the hold.
	never := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart", Pending: true})
	soon(t, "an answer without an IP", hold+250*time.Millisecond, func() {
		start := time.Now()
		status, body := get(t, never, roleList)
		if elapsed := time.Since(start); status != 503 || elapsed < hold-50*time.Millisecond {
			t.Errorf("without an IP the answer is %d %s after %v", status, body, elapsed)
		}
	})
}

// A hundred first requests at once, held for one STS call.
func TestLabOneCall(t *testing.T) {
	t.Parallel()
	n := labtest.Node(t, shared, lab.NodeOptions{})
	labtest.Daemon(t, n, "-issuer", "web-identity")
	shop := shared.Unique("shop")
	role := serviceAccount(t, n, shop, "cart", "cart")
	release := n.AWS.Inject(aws.Fault{Operation: "AssumeRoleWithWebIdentity", Delay: time.Minute})
	p := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})

	// All are connected before the first of them asks: from then on the hold of 450 ms runs, on a machine as busy as it may be.
	const requests = 100
	var conns []net.Conn
	for range requests {
		c, err := p.Dial(labtest.Context(t), "tcp", "169.254.169.254:80")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
	}
	var g errgroup.Group
	for _, c := range conns {
		if _, err := io.WriteString(c, "GET "+roleList+" HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		g.Go(func() error {
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				return err
			}
			body, err := io.ReadAll(resp.Body)
			if err == nil && (resp.StatusCode != 200 || string(body) != "cart") {
				err = fmt.Errorf("a first request is answered %s: %s", resp.Status, body)
			}
			return err
		})
	}
	release()
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	if calls := issued(n); len(calls) != 1 || calls[0].RoleARN != role {
		t.Errorf("%d requests made %d STS calls, want 1", requests, len(calls))
	}
}

// issued are the calls for sessions that the node's AWS has seen.
func issued(n *lab.Node) []aws.Call {
	return slices.DeleteFunc(n.AWS.Calls(), func(c aws.Call) bool { return !strings.HasPrefix(c.Operation, "AssumeRole") })
}

// team makes pods with a role each, in one namespace; the first few have a network.
func team(t *testing.T, n *lab.Node, pods, connected int) (all []*lab.Pod, roles []string) {
	t.Helper()
	ctx := labtest.Context(t)
	namespace := shared.Unique("team")
	all, roles = make([]*lab.Pod, pods), make([]string, pods)
	var g errgroup.Group
	g.SetLimit(8)
	for i := range pods {
		g.Go(func() (err error) {
			name := fmt.Sprintf("app-%d", i)
			if roles[i], err = n.Role(name, aws.ActionListBuckets); err != nil {
				return err
			}
			if err := shared.ServiceAccount(ctx, namespace, name, map[string]string{roleAnnotation: roles[i]}); err != nil {
				return err
			}
			all[i], err = n.AddPod(ctx, lab.PodSpec{Namespace: namespace, Name: name, ServiceAccount: name, Detached: i >= connected})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	return all, roles
}

// Two hundred sessions fall due together while pods go on asking: nobody waits for STS.
func TestLabRefreshTogether(t *testing.T) {
	t.Parallel()
	const keys, asking = 200, 10
	// Served until 96 s after the issue, due after 70 s to 86 s.
	const length = 156 * time.Second
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	n := labtest.Node(t, shared, lab.NodeOptions{IPv4Only: true})
	n.AWS.SetSessionLength(length)
	pods, roles := team(t, n, keys, asking)
	d := labtest.Daemon(t, n, "-issuer", "web-identity", "-sts-rate", "100")
	if _, err := n.AWS.WaitCalls(ctx, keys, func(c aws.Call) bool { return c.Outcome == aws.OK }); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, func() error {
		m, err := d.Metrics(ctx)
		if err == nil && m[`imdsgate_credentials_entries{state="ready"}`] != keys {
			err = fmt.Errorf("%v sessions are ready", m[`imdsgate_credentials_entries{state="ready"}`])
		}
		return err
	})
	first := make([]document, asking)
	for i, p := range pods[:asking] {
		_, doc, err := credentials(ctx, p)
		if err != nil {
			t.Fatal(err)
		}
		first[i] = doc
	}
	before, err := d.Metrics(ctx)
	if err != nil {
		t.Fatal(err)
	}

	// From now on STS takes as long as a client may have to wait.
	defer n.AWS.Inject(aws.Fault{Operation: "AssumeRoleWithWebIdentity", Delay: 400 * time.Millisecond})()
	ended := make(chan struct{})
	var g errgroup.Group
	counts := make([]int, asking)
	for i, p := range pods[:asking] {
		g.Go(func() error {
			for {
				select {
				case <-ended:
					return nil
				case <-time.After(100 * time.Millisecond):
				}
				_, doc, err := credentials(ctx, p)
				if err == nil {
					err = owned(n, doc, roles[i])
				}
				if left := time.Until(doc.Expiration); err == nil && left < time.Minute {
					err = fmt.Errorf("credentials were served %v before they expire", left)
				}
				if err != nil {
					return err
				}
				counts[i]++
			}
		})
	}
	_, err = n.AWS.WaitCalls(ctx, 2*keys, func(c aws.Call) bool { return c.Outcome == aws.OK })
	close(ended)
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	after, err := d.Metrics(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, result := range []string{"wait", "error", "stale"} {
		name := `imdsgate_credentials_requests_total{result="` + result + `"}`
		if waited := after[name] - before[name]; waited != 0 {
			t.Errorf("%s grew by %v", name, waited)
		}
	}
	requests := 0
	for i, p := range pods[:asking] {
		requests += counts[i]
		if counts[i] < 20 {
			t.Errorf("pod %d asked %d times only", i, counts[i])
		}
		if _, doc, err := credentials(ctx, p); err != nil || doc.AccessKeyId == first[i].AccessKeyId {
			t.Errorf("the credentials of pod %d were not refreshed: %v", i, err)
		}
	}
	t.Logf("%d sessions were refreshed while %d requests were answered from memory", keys, requests)
}

// Of two hundred sessions to be issued at ten a second, those that pods ask for come first.
func TestLabAskedForComesFirst(t *testing.T) {
	t.Parallel()
	const keys, asking = 200, 5
	n := labtest.Node(t, shared, lab.NodeOptions{IPv4Only: true})
	pods, roles := team(t, n, keys, asking)
	labtest.Daemon(t, n, "-issuer", "web-identity", "-sts-rate", "10")
	for i, p := range pods[:asking] {
		before := len(issued(n))
		served(t, n, p, roles[i])
		// Two seconds of calls, whatever a second is on this machine.
		at := slices.IndexFunc(issued(n), func(c aws.Call) bool { return c.RoleARN == roles[i] })
		if at < 0 || at > before+20 {
			t.Errorf("an asked-for session was the %d. call, the first after it was asked for the %d.", at+1, before+1)
		}
	}
	if calls := len(issued(n)); calls > keys/2 {
		t.Errorf("there were %d STS calls before the asked-for sessions: nothing was shown", calls)
	} else {
		t.Logf("%d asked-for sessions were there after %d of %d STS calls", asking, calls, keys)
	}
}
