package e2e_test

import (
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// A daemon that is killed while STS is dead serves again, after its restart, what it had issued, to whom it still belongs; and a
// restart costs no STS call.
func TestLabRestartWithoutSTS(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	d := labtest.Daemon(t, n, "-issuer", "web-identity")
	shop := shared.Unique("shop")
	role := serviceAccount(t, n, shop, "cart", "cart")
	lost := serviceAccount(t, n, shop, "till", "till")
	cart := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
	till := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "till"})
	had := served(t, n, cart, role)
	served(t, n, till, lost)
	labtest.Eventually(t, func() error { return filesOfSessions(n, 2) })
	if info, err := os.Stat(filepath.Join(n.Dir(), "run", "imdsgate", "credentials")); err != nil {
		t.Error(err)
	} else if info.Mode().Perm() != 0o700 {
		t.Errorf("the directory of the sessions is %s", info.Mode())
	}
	calls := len(issued(n))

	if err := n.AWS.Kill(); err != nil {
		t.Fatal(err)
	}
	d.Kill()
	// While nobody looks, one of the two loses its role.
	if err := shared.ServiceAccount(ctx, shop, "till", nil); err != nil {
		t.Fatal(err)
	}
	d, err := d.Again(ctx)
	if err == nil {
		err = d.WaitReady(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	_, got, err := credentials(ctx, cart)
	if err != nil || got != had {
		t.Errorf("after a restart without STS the pod gets other credentials, or none: %v", err)
	}
	if status, body, err := ask(ctx, till, http.MethodGet, endpoint+roleList, nil); err != nil || status != http.StatusNotFound {
		t.Errorf("the pod without a role is answered %d: %v %s", status, err, body)
	}

	if err := n.AWS.Start(); err != nil {
		t.Fatal(err)
	}
	if err := d.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if d, err = d.Again(ctx); err == nil {
		err = d.WaitReady(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, got, err = credentials(ctx, cart); err != nil || got != had {
		t.Errorf("after a restart the pod gets other credentials, or none: %v", err)
	}
	if now := len(issued(n)); now != calls {
		t.Errorf("two restarts cost %d STS calls", now-calls)
	}
	if err := cart.Delete(ctx); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, func() error { return filesOfSessions(n, 1) }) // the other's, which nobody may have, goes when it expires
	labtest.Untouched(t, n, imds.Expected{})
}
