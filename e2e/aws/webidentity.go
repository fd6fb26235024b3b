package aws

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/big"
	"slices"
	"strings"
	"time"
)

// Provider is an IAM OIDC provider: an issuer of tokens that an account trusts.
type Provider struct {
	Account   string
	Issuer    string   // https://…, as in the tokens' iss
	ClientIDs []string // audiences
	// Keys fetches the issuer's JSON Web Key Set. It is called for every token, so that keys may change; its error is answered
	// like an issuer that AWS cannot reach.
	Keys func(context.Context) ([]byte, error)
}

// ARN is what trust policies call the provider.
func (p Provider) ARN() string {
	return fmt.Sprintf("arn:aws:iam::%s:oidc-provider/%s", p.Account, strings.TrimPrefix(p.Issuer, "https://"))
}

// SetProvider adds a provider or replaces the one of the same account and issuer.
func (s *Server) SetProvider(p Provider) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.providers = append(slices.DeleteFunc(s.providers, func(other Provider) bool { return other.ARN() == p.ARN() }), p)
}

func invalidToken(format string, args ...any) *refusal {
	return &refusal{400, "InvalidIdentityToken", fmt.Sprintf(format, args...)}
}

func (s *Server) assumeRoleWithWebIdentity(ctx context.Context, r *request) (any, *refusal) {
	q, refused := r.session()
	if refused != nil {
		return nil, refused
	}
	token := r.form.Get("WebIdentityToken")
	if refused := length(token, "webIdentityToken", 4, 20000); refused != nil {
		refused.message = strings.ReplaceAll(refused.message, token, "***")
		return nil, refused
	}
	account, _ := parseARN(q.roleARN) // session looked at it
	claims, provider, refused := s.verify(ctx, token, account.AccountID)
	if refused != nil {
		return nil, refused
	}
	r.call.Caller = claims.Subject

	s.mu.Lock()
	defer s.mu.Unlock()
	role, ok := s.roles[q.roleARN]
	if !ok || !slices.ContainsFunc(role.Trust, func(t Trust) bool {
		return t.Federated == provider.ARN() && matchAny(t.actions(), ActionWebIdentity) &&
			(t.Subject == "" || match(t.Subject, claims.Subject)) && (t.Audience == "" || slices.Contains(claims.Audience, t.Audience))
	}) {
		return nil, &refusal{403, "AccessDenied", "Not authorized to perform sts:AssumeRoleWithWebIdentity"}
	}
	answer, refused := s.newSession(r, role, q)
	if refused != nil {
		return nil, refused
	}
	return webIdentityResponse{
		Result: webIdentityResult{
			Credentials: answer.credentials, User: answer.user, Subject: claims.Subject,
			Provider: provider.ARN(), Audience: claims.Audience[0],
		},
		Meta: r.meta(),
	}, nil
}

type claims struct {
	Issuer    string   `json:"iss"`
	Subject   string   `json:"sub"`
	Audience  audience `json:"aud"`
	Expires   float64  `json:"exp"`
	NotBefore float64  `json:"nbf"`
}

// audience is a string or a list of them.
type audience []string

func (a *audience) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil {
		*a = audience{one}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(a))
}

// verify finds the provider of a token in an account and checks the token against it.
func (s *Server) verify(ctx context.Context, token, account string) (claims, Provider, *refusal) {
	var header struct{ Alg, Kid string }
	var c claims
	parts := strings.Split(token, ".")
	if len(parts) != 3 || decode(parts[0], &header) != nil || decode(parts[1], &c) != nil ||
		c.Issuer == "" || c.Subject == "" || len(c.Audience) == 0 || c.Expires == 0 {
		return c, Provider{}, invalidToken("The ID Token provided is not a valid JWT. (You may see this error if you sent an Access Token)")
	}
	signature, err := base64.RawURLEncoding.DecodeString(parts[2])
	if err != nil {
		return c, Provider{}, invalidToken("The ID Token provided is not a valid JWT. (You may see this error if you sent an Access Token)")
	}
	s.mu.Lock()
	i := slices.IndexFunc(s.providers, func(p Provider) bool { return p.Account == account && p.Issuer == c.Issuer })
	var provider Provider
	if i >= 0 {
		provider = s.providers[i]
	}
	s.mu.Unlock()
	if i < 0 {
		return c, provider, invalidToken("No OpenIDConnect provider found in your account for %s", c.Issuer)
	}
	set, err := provider.Keys(ctx) // not under the lock: the issuer may hang
	if err != nil {
		return c, provider, invalidToken("Couldn't retrieve verification key from your identity provider,  please reference AssumeRoleWithWebIdentity documentation for requirements")
	}
	key, err := findKey(set, header.Kid, header.Alg)
	if err != nil {
		return c, provider, invalidToken("Couldn't retrieve verification key from your identity provider,  please reference AssumeRoleWithWebIdentity documentation for requirements")
	}
	if !key.verify(parts[0]+"."+parts[1], signature) {
		return c, provider, invalidToken("The ID Token provided has an invalid signature")
	}
	now := s.now()
	if expires := unix(c.Expires); !now.Before(expires) {
		return c, provider, &refusal{400, "ExpiredTokenException",
			fmt.Sprintf("Token expired: current date/time %d must be before the expiration date/time %d", now.Unix(), expires.Unix())}
	}
	if unix(c.NotBefore).After(now.Add(5 * time.Minute)) {
		return c, provider, invalidToken("Token is not yet valid")
	}
	if !slices.ContainsFunc(c.Audience, func(a string) bool { return slices.Contains(provider.ClientIDs, a) }) {
		return c, provider, invalidToken("Incorrect token audience")
	}
	return c, provider, nil
}

func unix(seconds float64) time.Time { return time.Unix(int64(seconds), 0) }

func decode(part string, v any) error {
	b, err := base64.RawURLEncoding.DecodeString(part)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

// publicKey is a key of a JSON Web Key Set, for RS256 or ES256.
type publicKey struct {
	rsa   *rsa.PublicKey
	ecdsa *ecdsa.PublicKey
}

func findKey(set []byte, kid, alg string) (publicKey, error) {
	var keys struct {
		Keys []struct{ Kid, Kty, Alg, Crv, N, E, X, Y string }
	}
	if err := json.Unmarshal(set, &keys); err != nil {
		return publicKey{}, err
	}
	for _, k := range keys.Keys {
		if k.Kid != kid || k.Alg != "" && k.Alg != alg {
			continue
		}
		switch {
		case k.Kty == "RSA" && alg == "RS256":
			n, e := number(k.N), number(k.E)
			if !e.IsInt64() || e.Int64() > math.MaxInt32 {
				return publicKey{}, errors.New("the RSA exponent is too large")
			}
			key := &rsa.PublicKey{N: n, E: int(e.Int64())}
			if key.N.BitLen() < 2048 || key.E < 3 {
				return publicKey{}, errors.New("the RSA key is too weak")
			}
			return publicKey{rsa: key}, nil
		case k.Kty == "EC" && k.Crv == "P-256" && alg == "ES256":
			x, y := number(k.X), number(k.Y)
			if x.BitLen() > 256 || y.BitLen() > 256 {
				return publicKey{}, errors.New("the EC key is not on P-256")
			}
			point := make([]byte, 65)
			point[0] = 4 // uncompressed
			x.FillBytes(point[1:33])
			y.FillBytes(point[33:])
			key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
			if err != nil {
				return publicKey{}, err
			}
			return publicKey{ecdsa: key}, nil
		}
	}
	return publicKey{}, fmt.Errorf("no %s key %q", alg, kid)
}

// number decodes a number of a key; what is none becomes 0, which no key accepts.
func number(s string) *big.Int {
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		return new(big.Int)
	}
	return new(big.Int).SetBytes(b)
}

func (k publicKey) verify(signed string, signature []byte) bool {
	sum := sha256.Sum256([]byte(signed))
	if k.rsa != nil {
		return rsa.VerifyPKCS1v15(k.rsa, crypto.SHA256, sum[:], signature) == nil
	}
	return len(signature) == 64 &&
		ecdsa.Verify(k.ecdsa, sum[:], new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:]))
}
