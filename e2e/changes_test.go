package e2e_test

import (
	"net/http"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// Annotations change while a pod runs, and objects go: what the pod gets follows, without a restart of anything.
func TestLabChanges(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	labtest.Daemon(t, n, "-pod-annotations")
	shop := shared.Unique("shop")
	const allow = "iam.amazonaws.com/allowed-roles"
	consent := func(value string) {
		t.Helper()
		if err := shared.Namespace(ctx, shop, map[string]string{allow: value}); err != nil {
			t.Fatal(err)
		}
	}
	consent(`["arn:aws:iam::123456789012:role/*"]`)
	first := serviceAccount(t, n, shop, "cart", "first")
	p := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
	gets := func(role string) {
		t.Helper()
		labtest.Eventually(t, func() error {
			_, doc, err := credentials(ctx, p)
			if err == nil {
				err = owned(n, doc, role)
			}
			return err
		})
	}
	is := func(status int) {
		t.Helper()
		labtest.Eventually(t, func() error { return wantStatus(p, roleList, status) })
	}
	gets(first)
	second := serviceAccount(t, n, shop, "cart", "second")
	gets(second)
	if status, _ := get(t, p, roleList+"first"); status != http.StatusNotFound {
		t.Errorf("the earlier role is answered %d", status)
	}
	consent(`["arn:aws:iam::123456789012:role/first"]`)
	is(http.StatusForbidden)
	consent(`["arn:aws:iam::123456789012:role/*"]`)
	gets(second)
	if err := shared.ServiceAccount(ctx, shop, "cart", nil); err != nil {
		t.Fatal(err)
	}
	is(http.StatusNotFound)
	third, err := n.Role("third", aws.ActionListBuckets)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Annotate(ctx, map[string]string{"iam.amazonaws.com/role": third}); err != nil {
		t.Fatal(err)
	}
	gets(third)
	gets(serviceAccount(t, n, shop, "cart", "first")) // the service account's wins
	if err := shared.Kube.CoreV1().ServiceAccounts(shop).Delete(ctx, "cart", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	gets(third)
	labtest.Untouched(t, n, imds.Expected{NodeRole: true})
}

// A pod that has its credentials from elsewhere costs no STS call, until it asks here after all.
func TestLabCredentialsFromElsewhere(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	labtest.Daemon(t, n, "-issuer", "web-identity")
	shop := shared.Unique("shop")
	irsa, identity := serviceAccount(t, n, shop, "irsa", "irsa"), serviceAccount(t, n, shop, "identity", "identity")
	here := serviceAccount(t, n, shop, "here", "here")
	p := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "irsa", Env: map[string]string{"AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/secrets/token"}})
	labtest.Pod(t, n, lab.PodSpec{
		Namespace: shop, ServiceAccount: "identity", Env: map[string]string{"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://169.254.170.23/v1/credentials"},
	})
	labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "here"})
	if _, err := n.AWS.WaitCalls(ctx, 1, func(c aws.Call) bool { return c.RoleARN == here }); err != nil {
		t.Fatal(err)
	}
	for _, c := range issued(n) {
		if c.RoleARN == irsa || c.RoleARN == identity {
			t.Errorf("%s was prefetched", c.RoleARN)
		}
	}
	served(t, n, p, irsa)
}
