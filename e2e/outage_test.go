package e2e_test

import (
	"fmt"
	"net/http"
	"path/filepath"
	"testing"

	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// A daemon that starts anew with neither STS nor the API server. What it had issued is there, and a CNI result may confirm the pod,
// but nobody can say whether the pod still has the role: 503, until the API server is back. Then what was kept is served, to whom
// it still belongs, without STS. This test runs alone: the others share the API server.
func TestLabRestartWithoutSTSAndAPIServer(t *testing.T) {
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	d := labtest.Daemon(t, n, "-issuer", "web-identity")
	shop := shared.Unique("shop")
	role := serviceAccount(t, n, shop, "cart", "cart")
	tills := serviceAccount(t, n, shop, "till", "till")
	cart := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
	till := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "till"})
	had := served(t, n, cart, role)
	served(t, n, till, tills)
	labtest.Eventually(t, func() error { return filesOfSessions(n, 2) })
	d.Kill()
	if err := shared.ServiceAccount(ctx, shop, "till", nil); err != nil { // while nobody looks, it loses its role
		t.Fatal(err)
	}
	if err := n.AWS.Kill(); err != nil {
		t.Fatal(err)
	}
	calls := len(issued(n))
	shared.ControlPlane.StopAPIServer()
	back := false
	defer func() {
		if !back { // for the tests after this one
			if err := shared.ControlPlane.StartAPIServer(ctx); err != nil {
				t.Error(err)
			}
		}
	}()

	d, err := d.Again(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []*lab.Pod{cart, till} {
		labtest.Eventually(t, func() error { return wantStatus(p, roleList, http.StatusServiceUnavailable) })
		resp, err := getResponse(ctx, p, roleList+p.ServiceAccount)
		if err != nil || resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") != "1" {
			t.Errorf("%s's document without the API server: %+v, %v", p.ServiceAccount, resp, err)
		}
		if err := attack(ctx, p); err != nil {
			t.Error(err)
		}
		token(t, p) // depends on nothing
	}
	if err := filesOfSessions(n, 2); err != nil { // they are not given up
		t.Error(err)
	}

	if err := shared.ControlPlane.StartAPIServer(ctx); err != nil {
		t.Fatal(err)
	}
	back = true
	if err := d.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	if _, got, err := credentials(ctx, cart); err != nil || got != had {
		t.Errorf("the pod gets other credentials than it had, or none: %v", err)
	}
	if err := wantStatus(till, roleList, http.StatusNotFound); err != nil {
		t.Error(err)
	}
	if now := len(issued(n)); now != calls {
		t.Errorf("%d STS calls", now-calls)
	}
	labtest.Untouched(t, n, imds.Expected{})
}

// filesOfSessions complains unless so many sessions are kept.
func filesOfSessions(n *lab.Node, want int) error {
	found, err := filepath.Glob(filepath.Join(n.Dir(), "run", "imdsgate", "credentials", "*.json"))
	if err == nil && len(found) != want {
		err = fmt.Errorf("%d sessions are kept, want %d", len(found), want)
	}
	return err
}
