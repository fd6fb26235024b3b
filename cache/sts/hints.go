package sts

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws/arn"

	"github.com/imdsgate/imdsgate/cache"
)

// refusal is STS's answer, with the web identity token that it is about, if any.
type refusal struct{ code, message, token string }

// hint says what to change. It is shown to the pod: no secret, no address of this node's network.
func (s *STS) hint(op string, key cache.Key, r refusal) string {
	switch r.code {
	case "AccessDenied":
		if kind, ok := refusedBy(r.message); ok && (op == opAssumeRole || strings.Contains(r.message, explicitDeny)) {
			return s.policyHint(key, kind, strings.Contains(r.message, explicitDeny))
		}
		if op == opWebIdentity {
			return webIdentityHint(key, r.token)
		}
		if op == opAssumeRole {
			return s.assumeRoleHint(key, r.message)
		}
	case "InvalidIdentityToken":
		return providerHint(key, r)
	case "IDPCommunicationError":
		return keysHint
	case "ValidationError":
		switch {
		case strings.Contains(r.message, "role chaining"):
			return "shorten the session duration to 1h"
		case strings.Contains(r.message, "MaxSessionDuration"):
			return "shorten the session duration, or raise the role's MaxSessionDuration"
		case strings.Contains(r.message, "roleArn"), strings.Contains(r.message, "ARN"), strings.HasSuffix(r.message, "is invalid"):
			return "correct the role's ARN"
		}
	case "RegionDisabledException":
		return "activate this region's STS endpoint in the role's account"
	case "PackedPolicyTooLarge":
		return "the session tags are too long: turn -session-tags off"
	case "RequestExpired", "SignatureDoesNotMatch":
		if strings.Contains(r.message, "xpired") || strings.Contains(r.message, "current") || r.code == "RequestExpired" {
			return "set the node's clock: STS takes requests for five minutes only (timedatectl on the node says whether NTP works)"
		}
		return "check the node's clock and credentials"
	case "ExpiredToken", "ExpiredTokenException", "InvalidClientTokenId":
		if op != opWebIdentity {
			return "the node's own credentials are not accepted: see that its instance profile and its role exist"
		}
		return "check the clocks of the node and of the API server"
	}
	return ""
}

const keysHint = "STS must be able to fetch the keys of the cluster's issuer: <issuer>/.well-known/openid-configuration and the jwks_uri in it must be public"

// tokenHint is about a web identity token that could not be had.
const tokenHint = "imdsgate must be allowed to create tokens of the service account: see the ClusterRole and the admission policy of its chart"

// unansweredHint is about a call that STS did not answer.
func unansweredHint(err error) string {
	switch codeLabel(err) {
	case codeTimeout, codeUnreachable:
		return "this node must reach STS: check AWS_REGION, AWS_ENDPOINT_URL_STS, HTTPS_PROXY and AWS_CA_BUNDLE of imdsgate, the node's " +
			"DNS, routes and security groups; imdsgate -check on the node says what fails"
	}
	if status(err) != 0 {
		return "something between this node and STS answers instead of it: check HTTPS_PROXY and AWS_ENDPOINT_URL_STS of imdsgate"
	}
	return ""
}

// statement is one of a trust policy.
type statement struct {
	Effect    string
	Principal struct {
		AWS       string `json:",omitempty"`
		Federated string `json:",omitempty"`
	}
	Action    any
	Condition map[string]map[string]string `json:",omitempty"`
}

func (s statement) String() string {
	s.Effect = "Allow"
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(s); err != nil {
		return ""
	}
	return strings.TrimSpace(b.String())
}

// assumeRoleHint tells the statement that the role's trust policy needs. STS answers alike for a role that does not exist.
func (s *STS) assumeRoleHint(key cache.Key, message string) string {
	var trust statement
	trust.Action = "sts:AssumeRole"
	if key.Tags != (cache.Tags{}) {
		trust.Action = []string{"sts:AssumeRole", "sts:TagSession"}
	}
	who := s.who(key.RoleARN)
	trust.Principal.AWS = principal(message)
	if trust.Principal.AWS == "" {
		trust.Principal.AWS = "<ARN of " + who + ">"
	}
	if key.ExternalID != "" {
		trust.Condition = map[string]map[string]string{"StringEquals": {"sts:ExternalId": "<the external ID of the annotation>"}}
	}
	wants := ""
	if key.ExternalID == "" && (s.intermediate == nil || s.intermediate.role != key.RoleARN) {
		wants = "; if it asks for an external ID, annotate imdsgate.dev/external-id"
	}
	return "see that the role exists, path and case included, and, if it is in another account or trusts the whole account, that the policy of " + who +
		" allows it" + wants + "; add to its trust policy (with the path of the principal, if it has one): " + trust.String()
}

// explicitDeny is what STS says where a policy refuses what others may allow.
const explicitDeny = "with an explicit deny in "

// reason is the end of STS's text where it tells which kind of policy decided. The words are those of IAM's user guide,
// "Troubleshoot access denied error messages".
var reason = regexp.MustCompile(`(?:` + explicitDeny + `(?:an? )?|because no )(identity-based policy|resource-based policy|permissions boundary|session policy|` +
	`service control policy|resource control policy|VPC endpoint policy)`)

// refusedBy is the kind of policy that refused, if STS tells and it is not the trust policy's missing permission.
func refusedBy(message string) (kind string, ok bool) {
	m := reason.FindStringSubmatch(message)
	if m == nil || m[1] == "resource-based policy" && !strings.Contains(message, explicitDeny) {
		return "", false
	}
	return m[1], true
}

// policyHint is about a refusal that no statement of a trust policy can mend.
func (s *STS) policyHint(key cache.Key, kind string, denies bool) string {
	if kind == "resource-based policy" {
		kind = "the role's trust policy"
	} else {
		kind = "the " + kind
	}
	if denies {
		return "find the statement with Effect Deny in " + kind + " and except this role from it: no Allow elsewhere counts against it"
	}
	if kind == "the identity-based policy" && harmless.MatchString(key.RoleARN) {
		return fmt.Sprintf(`add to the policy of %s: {"Effect":"Allow","Action":"sts:AssumeRole","Resource":"%s"}; the role's trust policy must allow it too`, s.who(key.RoleARN), key.RoleARN)
	}
	return kind + " that applies to " + s.who(key.RoleARN) + " must allow it, beside its own policy and the role's trust policy"
}

// who assumes a role.
func (s *STS) who(role string) string {
	if s.intermediate != nil && s.intermediate.role != role {
		return "the intermediate role"
	}
	return "the node's role"
}

// principal is the ARN of who was refused in STS's text, "User: arn:aws:sts::123456789012:assumed-role/node/i-0 is not
// authorized …": the role of a session.
func principal(message string) string {
	_, rest, found := strings.Cut(message, "User: ")
	who, _, _ := strings.Cut(rest, " ")
	a, err := arn.Parse(who)
	if !found || err != nil || !harmless.MatchString(who) {
		return ""
	}
	if session, ok := strings.CutPrefix(a.Resource, "assumed-role/"); ok {
		role, _, _ := strings.Cut(session, "/")
		return fmt.Sprintf("arn:%s:iam::%s:role/%s", a.Partition, a.AccountID, role)
	}
	return who
}

// webIdentityHint tells the statement that the role's trust policy needs.
func webIdentityHint(key cache.Key, token string) string {
	words := fmt.Sprintf("the role must exist, and its trust policy must allow sts:AssumeRoleWithWebIdentity to the cluster's OIDC provider for sub %q and aud %q",
		subject(key), key.Audience)
	provider, issuer := providerOf(key, token)
	if provider == "" {
		return words
	}
	var trust statement
	trust.Action = "sts:AssumeRoleWithWebIdentity"
	trust.Principal.Federated = provider
	trust.Condition = map[string]map[string]string{"StringEquals": {issuer + ":sub": subject(key), issuer + ":aud": key.Audience}}
	if hint := "see that the role exists and add to its trust policy: " + trust.String(); len(hint) <= maxHint {
		return hint
	}
	return words
}

// providerHint is about a token that the account's OIDC provider does not accept.
func providerHint(key cache.Key, r refusal) string {
	provider, issuer := providerOf(key, r.token)
	switch {
	case strings.HasPrefix(issuer, "kubernetes.default."):
		return "AWS cannot reach https://" + issuer + ", the issuer of this cluster's tokens: give the API server a public --service-account-issuer, " +
			"then create an IAM OIDC provider for it in the role's account (docs/roles.md)"
	case strings.Contains(r.message, "OpenIDConnect provider"), strings.Contains(r.message, "issuer"):
		hint := "create an IAM OIDC provider for the cluster's issuer in the role's account"
		if a, err := arn.Parse(provider); err == nil && harmless.MatchString(key.Audience) {
			hint = fmt.Sprintf("create an IAM OIDC provider for the cluster's issuer in account %s: aws iam create-open-id-connect-provider --url https://%s --client-id-list %s",
				a.AccountID, issuer, key.Audience)
		}
		return hint
	case strings.Contains(r.message, "verification key"):
		return keysHint
	case strings.Contains(r.message, "audience"):
		if provider != "" && harmless.MatchString(key.Audience) {
			return fmt.Sprintf("let the cluster's IAM OIDC provider take the audience: aws iam add-client-id-to-open-id-connect-provider --open-id-connect-provider-arn %s --client-id %s",
				provider, key.Audience)
		}
		return fmt.Sprintf("the cluster's IAM OIDC provider must have the client ID %q", key.Audience)
	}
	return ""
}

// harmless are texts that mean no more to a shell than themselves.
var harmless = regexp.MustCompile(`^[\w.:/@+=,-]+$`)

// providerOf is the ARN of the OIDC provider of a token's issuer in the role's account, and the issuer without its scheme;
// empty if the token does not tell. The token is the API server's and was sent to STS: only its claim is read here.
func providerOf(key cache.Key, token string) (provider, issuer string) {
	parts := strings.Split(token, ".")
	role, err := arn.Parse(key.RoleARN)
	if len(parts) != 3 || err != nil {
		return "", ""
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	var claims struct {
		Issuer string `json:"iss"`
	}
	if err != nil || json.Unmarshal(payload, &claims) != nil {
		return "", ""
	}
	issuer, https := strings.CutPrefix(claims.Issuer, "https://")
	if !https || !harmless.MatchString(issuer) {
		return "", ""
	}
	return fmt.Sprintf("arn:%s:iam::%s:oidc-provider/%s", role.Partition, role.AccountID, issuer), issuer
}

func subject(key cache.Key) string {
	return "system:serviceaccount:" + key.Namespace + ":" + key.ServiceAccount
}
